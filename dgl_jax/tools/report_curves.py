"""Curves of a report as inline SVG. Plain Python."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgl_jax.tools.report_runs import Curve

WIDTH, HEIGHT = 360, 220
# Inner box of a panel: left, top, right, bottom.
BOX = (44.0, 26.0, 352.0, 188.0)
# Classes c0 to c7 and d1 to d3 of the style sheet.
COLORS, DASHES = 8, 4


@dataclass(frozen=True)
class Line:
    """Line of a panel.

    Attributes:
      number: decides color and dashes, and joins the lines of a row in several panels.
      label: name of the line, shown on demand; may be empty.
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

    name = html.escape(title)
    grid = "".join(f"M{left:g} {y_of(y):.1f}H{right:g}" for y in y_ticks)
    parts = [
        f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f'<text class="title" x="{left:g}" y="15">{name}</text><path class="grid" d="{grid}"/>'
        f'<path class="axis" d="M{left:g} {bottom:g}H{right:g}"/>'
        f'<g class="x"><text x="{(left + right) / 2:g}" y="{HEIGHT - 4}">epoch</text>'
    ]
    parts += [
        f'<text x="{x_of(x):.1f}" y="{bottom + 14:g}">{x:g}</text>'
        for x in x_ticks
        if min(xs) <= x <= max(xs)
    ]
    parts.append('</g><g class="y">')
    parts += [f'<text x="{left - 5:g}" y="{y_of(y) + 4:.0f}">{y:g}</text>' for y in y_ticks]
    parts.append("</g>")
    for line, (at, values) in zip(lines, curves):
        points = [(x_of(x), y_of(factor * y)) for x, y in zip(at, values)]
        # Tenths are not visible where few points are far apart.
        parts.append(_drawn(line, points, digits=0 if len(points) < 40 else 1))
    return "".join([*parts, "</svg>"])


def style(number: int) -> str:
    """Returns the classes that color and dash a line in the style sheet."""
    dashes = number // COLORS % DASHES
    return f"c{number % COLORS}" + (f" d{dashes}" if dashes else "")


def _drawn(line: Line, points: list[tuple[float, float]], digits: int) -> str:
    label = f"<title>{html.escape(line.label)}</title>" if line.label else ""
    names = f'class="{style(line.number)}" data-line="{line.number}"'
    rounded = [[f"{value:.{digits}f}" for value in point] for point in points]
    if len(points) == 1:
        ((x, y),) = rounded
        return f'<circle cx="{x}" cy="{y}" r="3" {names}>{label}</circle>'
    return f'<polyline {names} points="{" ".join(map(",".join, rounded))}">{label}</polyline>'


def _widened(low: float, high: float) -> tuple[float, float]:
    """Returns a range that is not empty."""
    size = max(abs(low), abs(high), 1e-30)
    return (low, high) if high - low > 1e-9 * size else (low - 0.5 * size, high + 0.5 * size)


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
    """Returns powers of ten that cover a range, with 2 and 5 between them if there are few."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    steps = (1, 2, 5) if last - first <= 5 else (1,)
    powers = range(first, last + 1, max(1, (last - first) // 8))
    ticks = [float(f"{f}e{n}") for n in (*powers, last) for f in steps]
    below, above = max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)
    return sorted({t for t in ticks if below <= t <= above})
