"""Drawing primitives shared by all plots of a run: axes, lines, colors and a table of values.

Only this file and the tools import matplotlib.
"""

import itertools
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from dgl_jax.run.curves import Curve, Record, epoch_or_step
from dgl_jax.system import cache_dir


@contextmanager
def _any_environment() -> Iterator[None]:
    """Protects the import of matplotlib from the environment.

    A backend in MPLBACKEND that is not installed would make the import fail, although plots are
    drawn into files and need none. The variable is therefore hidden during the import, and applied
    afterwards if matplotlib knows the backend. Without a home directory matplotlib needs another
    folder for its configuration.
    """
    before = {name: os.environ.get(name) for name in ("MPLBACKEND", "MPLCONFIGDIR")}
    if "matplotlib" not in sys.modules:
        os.environ.pop("MPLBACKEND", None)
        if not os.path.isabs(os.path.expanduser("~")):
            os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if before["MPLBACKEND"]:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = before["MPLBACKEND"]


with _any_environment():
    import matplotlib
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
    from matplotlib.transforms import ScaledTranslation


@contextmanager
def own_style() -> Iterator[None]:
    """Draws as this package does, whatever style the user has configured for other plots.

    Fonts without glyphs for a character, such as one in the name of a run, draw a box; matplotlib's
    warning about it is hidden.
    """
    with matplotlib.style.context("default", after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


# Name, color, and the curves whose last values are shown.
Row = tuple[str, Any, Sequence[Curve]]
GRAY = "#666666"
_ENSEMBLE = "#d1495b"


def colors_of(records: Iterable[Record], names: Sequence[str]) -> dict[str, Any]:
    """Returns a color for every module of a run and for the ensemble.

    Colors darken with depth. A module has the same color in every plot of a run, because the color
    depends on all modules in `records`, not on the modules that the plot shows.

    Args:
      records: records of the run.
      names: further names of modules.
    """
    keys = itertools.chain(names, *records)
    modules = 1 + max(
        (int(number) for key in keys for number in re.findall(r"module_(\d+)", key)), default=0
    )
    # Without the light yellow end of the colormap, which is invisible on white.
    shades = matplotlib.colormaps["viridis_r"](
        np.linspace(0.2, 0.95, modules) if modules > 1 else [0.8]
    )
    return {f"module_{k}": shade for k, shade in enumerate(shades)} | {"ensemble": _ENSEMBLE}


def curve_axes(
    title: str, subtitle: str, ylabel: str, records: Sequence[Record], rows: int
) -> tuple[Figure, Axes]:
    """Creates a figure with epochs (steps, if the records have no epochs) on the horizontal axis.

    Args:
      title: title of the figure.
      subtitle: line below the title; may be empty.
      ylabel: label of the vertical axis.
      records: records to show, which decide the horizontal limits.
      rows: number of rows that `value_table` will have, which decides the height.
    """
    figure, axes = new_axes(title, subtitle, max(4.4, 0.24 * rows + 1.6))
    _over_epochs(axes, records, ylabel)
    return figure, axes


def paired_axes(
    title: str, subtitle: str, ylabels: tuple[str, str], records: Sequence[Record]
) -> tuple[Figure, tuple[Axes, Axes]]:
    """Creates a figure with two pairs of axes side by side; see `curve_axes` for the arguments."""
    figure, left = new_axes(title, subtitle, 4.4)
    figure.set_figwidth(11.0)
    left.set_subplotspec(figure.add_gridspec(1, 2)[0])
    right = figure.add_subplot(1, 2, 2)
    _clear(right)
    for axes, ylabel in zip((left, right), ylabels):
        _over_epochs(axes, records, ylabel)
    return figure, (left, right)


def _over_epochs(axes: Axes, records: Sequence[Record], ylabel: str) -> None:
    # Records of turns, which no curve shows, have a step and no epoch.
    positions = [epoch_or_step(record) for record in records if "turns" not in record]
    left, right = min(positions, default=0.0), max(positions, default=1.0)
    axes.set_xlim(min(left, 0.0) if right > 0 else -0.5, right or 0.5)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=right >= 4, steps=[1, 2, 5, 10]))
    axes.set_xlabel(
        "epoch" if any(record.get("epoch") is not None for record in records) else "step",
        fontsize=11,
    )
    axes.set_ylabel(ylabel, fontsize=11)
    axes.grid(color="#e6e6e6", linewidth=0.8)


def new_axes(title: str, subtitle: str, height: float) -> tuple[Figure, Axes]:
    """Creates a figure with one pair of axes in the common style; `height` is in inches."""
    figure = Figure(figsize=(8.6, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _clear(axes)
    if subtitle:
        offset = ScaledTranslation(0, 6 / 72, figure.dpi_scale_trans)
        style: dict[str, Any] = {"fontsize": 10, "color": GRAY, "parse_math": False}
        axes.text(0, 1, subtitle, transform=axes.transAxes + offset, **style)
    font: dict[str, Any] = {"fontsize": 13, "fontweight": "bold"}
    axes.set_title(title, loc="left", pad=24 if subtitle else 10, parse_math=False, **font)
    return figure, axes


def _clear(axes: Axes) -> None:
    """Leaves the frame of the axes at the left and below only."""
    axes.tick_params(labelsize=10, color=GRAY)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def log_scale(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers at its major ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_line(axes: Axes, curve: Curve, color: Any, label: str, **style: Any) -> None:
    """Draws a curve, if it has points."""
    if curve[0]:
        # A curve with a single point is drawn as a dot: a line would be invisible.
        marker = "o" if len(curve[0]) == 1 else ""
        axes.plot(
            *curve,
            color=color,
            label=label,
            marker=marker,
            markersize=4,
            solid_capstyle="round",
            **style,
        )


def draw_newest(axes: Axes, curve: Curve, color: Any, label: str) -> None:
    """Draws the newest test result as a diamond; an extended run has earlier results too."""
    if curve[0]:
        end = (curve[0][-1:], curve[1][-1:])
        axes.plot(
            *end,
            "D",
            color=color,
            markersize=6,
            markeredgecolor="white",
            label=label,
            clip_on=False,
            zorder=5,
        )


def value_table(axes: Axes, rows: Iterable[Row], header: Sequence[str], form: str = ".3f") -> None:
    """Writes the newest value of each curve, and the name of each row, to the right of the axes.

        |       _____........  0.92  module 1
        |   ___/
        |  /    _____........  0.87  module 0
        |_/____/

    Rows are as close to the ends of their first curves as is possible without overlap, and a dotted
    line connects the two.

    Args:
      axes: the axes, with all curves drawn.
      rows: rows of the table.
      header: titles of the columns, one per curve of a row; columns without values are left out.
      form: format of the values.
    """
    height = axes.figure.bbox.height / axes.figure.dpi - 1.4  # of the axes, roughly, in inches
    last_points = [
        (name, color, [[(x, y) for x, y in zip(*c) if math.isfinite(y)][-1:] for c in curves])
        for name, color, curves in rows
    ]
    entries = [
        (next(end[0] for end in ends if end), name, color, ends)
        for name, color, ends in last_points
        if any(ends)
    ]
    if not entries:
        return
    entries.sort(key=lambda row: row[0][1])
    # matplotlib updates the limits lazily: reading them makes the transforms below up to date.
    axes.get_xlim()
    axes.get_ylim()
    to_axes = axes.transScale + axes.transLimits  # to fractions of the axes, before any layout
    wanted = np.array([to_axes.transform(point)[1] for point, *_ in entries])
    # Least squares with a minimal gap between rows: after subtracting the gaps of the rows below,
    # the heights need only be nondecreasing.
    gap = min(0.2 / height, 1 / max(1, len(entries) - 1))
    gaps = gap * np.arange(len(entries))
    heights = np.clip(_increasing(wanted - gaps), 0, 1 - gaps[-1]) + gaps

    def right(points: float) -> Any:
        """Returns axes coordinates, shifted to the right by `points`."""
        return axes.transAxes + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    used = [n for n in range(len(header)) if any(ends[n] for *_, ends in entries)]
    offsets = {n: 76 + (54 if len(used) > 1 else 0) * column for column, n in enumerate(used)}
    for n, offset in offsets.items():
        style: dict[str, Any] = {"va": "center", "ha": "right", "fontsize": 8, "color": GRAY}
        axes.text(1, heights[-1] + 1.1 * gap, header[n], transform=right(offset), **style)
    for (point, name, color, ends), y in zip(entries, heights):
        style = {"va": "center", "fontsize": 10, "color": color}
        for n, offset in offsets.items():
            text = format(ends[n][0][1], form) if ends[n] else ""
            axes.text(1, y, text, ha="right", transform=right(offset), **style)
        style |= {"fontweight": "bold", "parse_math": False}
        axes.text(1, y, name, transform=right(max(offsets.values()) + 14), **style)
        arrow = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.8,
            "linestyle": ":",
            "shrinkA": 0,
            "shrinkB": 3,
        }
        axes.annotate(
            "", point, (1, y), textcoords=right(26), arrowprops=arrow, annotation_clip=False
        )


def _increasing(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the nondecreasing sequence closest to `values` in least squares.

    This is isotonic regression (pool adjacent violators): neighbors out of order share their mean.
    """
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] += (mean - means[-1]) * count / (count + counts[-1])
            counts[-1] += count
    return np.repeat(means, counts)
