"""Curves of a report as inline SVG. Plain Python."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgl_jax.tools.report_runs import Curve

WIDTH, HEIGHT = 360, 220
# Inner box of a panel: left, top, right, bottom.
BOX = (44.0, 26.0, 352.0, 188.0)
COLORS = 8  # classes c0 to c7 of the style sheet
_DASHES = ("", "6 3", "2 2", "8 3 2 3")


@dataclass(frozen=True)
class Line:
    """Line of a panel.

    Attributes:
      number: decides color and dashes, and joins the lines of a row in several panels.
      label: name of the line.
      curve: positions and values; at least one.
    """

    number: int
    label: str
    curve: Curve


def thinned(curve: Curve, limit: int) -> Curve:
    """Returns at most `limit` points of a curve, evenly spaced, with the first and the last."""
    count = len(curve[0])
    if count <= limit:
        return curve
    chosen = [round(n * (count - 1) / (limit - 1)) for n in range(limit)]
    return [curve[0][n] for n in chosen], [curve[1][n] for n in chosen]


def panel(title: str, lines: Sequence[Line], percent: bool, limit: int) -> str:
    """Draws one panel of curves.

    Args:
      title: title of the panel.
      lines: its lines.
      percent: True if the values are fractions to be shown in percent. Other values, losses, get
        a logarithmic axis if they span more than a factor of ten.
      limit: greatest number of points per line.

    Returns:
      An SVG element; "" without lines.
    """
    if not lines:
        return ""
    factor = 100.0 if percent else 1.0
    curves = [thinned(line.curve, limit) for line in lines]
    xs = [x for curve in curves for x in curve[0]]
    ys = [factor * y for curve in curves for y in curve[1]]
    log = not percent and min(ys) > 0 and max(ys) > 10 * min(ys)
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), (_log_ticks if log else _ticks)(min(ys), max(ys))
    x_range = _widened(min(xs), max(xs))
    y_range = _widened(min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))
    left, top, right, bottom = BOX

    def x_of(x: float) -> float:
        return left + (right - left) * _share(x, x_range, False)

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * _share(y, y_range, log)

    parts = [
        f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{html.escape(title)}</title>"
        f'<text class="title" x="{left:g}" y="15">{html.escape(title)}</text>'
    ]
    for y in y_ticks:
        parts.append(
            f'<path class="grid" d="M{left:g} {y_of(y):.1f}H{right:g}"/>'
            f'<text class="tick" text-anchor="end" x="{left - 5:g}" y="{y_of(y) + 4:.1f}">'
            f"{y:g}</text>"
        )
    for x in x_ticks:
        if min(xs) <= x <= max(xs):
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{x_of(x):.1f}" y="{bottom + 14:g}">'
                f"{x:g}</text>"
            )
    parts.append(
        f'<path class="axis" d="M{left:g} {bottom:g}H{right:g}"/><text class="tick" '
        f'text-anchor="middle" x="{(left + right) / 2:g}" y="{HEIGHT - 4}">epoch</text>'
    )
    for line, (at, values) in zip(lines, curves):
        points = [(x_of(x), y_of(factor * y)) for x, y in zip(at, values)]
        parts.append(_drawn(line, points))
    return "".join([*parts, "</svg>"])


def style(number: int) -> tuple[str, str]:
    """Returns the class that colors a line, and its pattern of dashes ("" for none)."""
    return f"c{number % COLORS}", _DASHES[number // COLORS % len(_DASHES)]


def _drawn(line: Line, points: list[tuple[float, float]]) -> str:
    color, dashes = style(line.number)
    attributes = f' data-line="{line.number}"'
    label = f"<title>{html.escape(line.label)}</title>"
    if len(points) == 1:
        x, y = points[0]
        dot = f'<circle cx="{_short(x)}" cy="{_short(y)}" r="3"'
        return f'{dot} class="dot {color}"{attributes}>{label}</circle>'
    text = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline class="line {color}"{attributes}{pattern} points="{text}">{label}</polyline>'


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _widened(low: float, high: float) -> tuple[float, float]:
    """Returns a range that is not empty."""
    return (
        (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(low) or 1))
    )


def _share(value: float, limits: tuple[float, float], log: bool) -> float:
    """Returns the position of a value in a range as a number from 0 to 1."""
    low, high = limits
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers that cover a range."""
    low, high = _widened(low, high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.6g}") for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns the powers of ten that cover a range, with 2 and 5 between them if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [float(f"{f}e{n}") for n in range(first, last + 1) for f in steps]
    below, above = [t for t in ticks if t <= low], [t for t in ticks if t >= high]
    return [t for t in ticks if below[-1] <= t <= above[0]]
