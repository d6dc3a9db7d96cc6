"""Writes the diagnostics of the claim `convergence` into its page, and draws them.

    python results/convergence.py WORKDIR

Run `make.py WORKDIR convergence` first, which restores stored runs and writes the page. Adds two
tables to it, between the marks `diagnostics`, and writes results/convergence_drift.png (drift sums
beside gradient norms) and results/convergence_passes.png (`dgl` beside `layerwise`, over the passes
of each module over the data).
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from make import COLORS, HERE, Row, make_row
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgl_jax.configs.claims import convergence
from dgl_jax.tools.report_runs import Run, read_runs

Line = tuple[list[float], list[float]]
FLOOR = 0.01  # smallest gradient norm in a picture: estimates may be below 0


def mean_line(runs: Sequence[Run], read: Callable[[Run], Line | None]) -> Line:
    """Returns the mean of a curve over runs; both lists are empty if no run has it."""
    curves = [curve for run in runs if (curve := read(run)) is not None]
    length = min((len(values) for _, values in curves), default=0)
    places = curves[0][0][:length] if curves else []
    return places, [statistics.mean(values[i] for _, values in curves) for i in range(length)]


def gradient(module: int) -> Callable[[Run], Line | None]:
    """Returns a function that estimates the squared gradient norm without sampling noise."""

    def read(run: Run) -> Line | None:
        squares, moments = (
            run.curves.get(("diagnostics", module, name))
            for name in ("gradient_squared", "gradient_second_moment")
        )
        if squares is None or moments is None:
            return None
        n = run.settings["diagnostics.batches"]
        pairs = zip(squares[1], moments[1], strict=True)
        return squares[0], [(n * square - moment) / (n - 1) for square, moment in pairs]

    return read


def metric(split: str, module: int, name: str) -> Callable[[Run], Line | None]:
    """Returns a function that reads a curve of a module."""
    return lambda run: run.curves.get((split, module, name))


def own_passes(run: Run, module: int, curve: Line) -> Line:
    """Returns a curve over the passes of a module over the data, while it trains.

    Under `layerwise` the modules train one after the other, each K times as fast as the epochs of
    the run pass. The first value after its last pass is the one of the module that this pass left,
    which is frozen then.
    """
    modules = len(run.summary["modules"])
    if run.settings["method.name"] != "layerwise":
        return curve
    passes = [modules * place - module * run.epoch for place in curve[0]]
    pairs = [
        (min(place, run.epoch), value)
        for before, place, value in zip([-1.0, *passes], passes, curve[1])
        if place >= 0 and before < run.epoch
    ]
    places, values = zip(*pairs) if pairs else ((), ())
    return list(places), list(values)


def at_begin(line: Line) -> str:
    """Returns the first value as text."""
    return f"{line[1][0]:.2f}" if line[1] else "-"


def at_end(line: Line) -> str:
    """Returns the mean of the last three values as text."""
    return f"{statistics.mean(line[1][-3:]):.2f}" if line[1] else "-"


def drift_table(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of a table with the last values of each module."""
    lines = [
        "| row | squared gradient norm before training, from module 0 on | at the end "
        "| drift sum, from module 1 on | codec error | staleness |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        count = len(row.runs[0].summary["modules"])
        columns = [
            (at_begin, [gradient(k) for k in range(count)]),
            (at_end, [gradient(k) for k in range(count)]),
            *(
                (at_end, [metric(split, k, name) for k in range(1, count)])
                for split, name in (
                    ("final", "weighted_drift"),
                    ("diagnostics", "codec_error"),
                    ("diagnostics", "staleness"),
                )
            ),
        ]
        cells = [
            " / ".join(show(mean_line(row.runs, read)) for read in reads) for show, reads in columns
        ]
        cells = ["" if set(cell) <= set("- /") else cell for cell in cells]
        lines.append(f"| `{row.name}` | " + " | ".join(cells) + " |")
    return lines


def draw_drift(rows: Sequence[Row], path: Path) -> None:
    """Draws gradient norms above drift sums, one column per row of the claim."""
    figure = Figure(
        figsize=(2.5 * len(rows), 5.2), dpi=120, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(rows), squeeze=False, sharex="col", sharey="row")
    for column, row in enumerate(rows):
        upper, lower = panels[:, column]
        for k in range(len(row.runs[0].summary["modules"])):
            color = COLORS[k]
            places, values = mean_line(row.runs, gradient(k))
            shown = [max(value, FLOOR) for value in values]
            upper.plot(places, shown, color=color, label=f"module {k}")
            lower.plot(*mean_line(row.runs, metric("final", k, "weighted_drift")), color=color)
        upper.set_title(row.name, fontsize=9)
        upper.set_yscale("log")
        lower.set_xlabel("epoch")
        for axes in (upper, lower):
            style(axes)
    panels[0, 0].set_ylabel("squared gradient norm")
    panels[1, 0].set_ylabel("drift sum")
    panels[0, -1].legend(frameon=False, fontsize=7)
    figure.savefig(path)


def draw_passes(rows: Sequence[Row], path: Path) -> list[str]:
    """Draws accuracy, gradient norms and drift of each module over its own passes over the data.

    Returns:
      Lines of a table with the validation accuracy over passes, and the last pass at which the
      second row is ahead of the first.
    """
    count = len(rows[0].runs[0].summary["modules"])
    figure = Figure(figsize=(2.8 * count, 7.2), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, count, squeeze=False, sharex="col", sharey="row")
    texts = []
    for k in range(count):
        upper, middle, lower = panels[:, k]
        accuracies = []
        for row, color in zip(rows, COLORS):

            def curve(run: Run, module: int = k) -> Line:
                places, values = run.curves["validation", module, "accuracy"]
                passes, values = own_passes(run, module, (places, [100 * v for v in values]))
                start = passes.count(0.0)  # the module has not been trained yet
                return passes[start:], values[start:]

            def drift(run: Run, module: int = k) -> Line | None:
                line = run.curves.get(("final", module, "weighted_drift"))
                return line and own_passes(run, module, line)

            def norm(run: Run, module: int = k) -> Line | None:
                line = gradient(module)(run)
                return line and own_passes(run, module, line)

            accuracies.append(mean_line(row.runs, curve))
            upper.plot(*accuracies[-1], color=color, label=row.name)
            places, values = mean_line(row.runs, norm)
            middle.plot(places, [max(value, FLOOR) for value in values], color=color)
            lower.plot(*mean_line(row.runs, drift), color=color)
        upper.set_title(f"module {k}", fontsize=9)
        middle.set_yscale("log")
        lower.set_xlabel("passes over the data")
        for axes in (upper, middle, lower):
            style(axes)
        texts.append(crossing(k, *accuracies))
    panels[0, 0].set_ylabel("validation accuracy, %")
    panels[1, 0].set_ylabel("squared gradient norm")
    panels[2, 0].set_ylabel("drift sum")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    names = [row.name for row in rows]
    columns = [f"`{name}`, % by pass" for name in names]
    header = f"| module | {' | '.join(columns)} | `layerwise` ahead until pass |"
    return [header, "|---|---|---|---|", *texts]


def crossing(module: int, first: Line, second: Line) -> str:
    """Returns a line of a table: two curves, and the last pass at which the second one is ahead."""
    one, other = (
        {round(place): value for place, value in zip(*line, strict=True)}
        for line in (first, second)
    )
    ahead = [place for place in sorted(one.keys() & other.keys()) if other[place] > one[place]]
    both = [place for place in sorted(one.keys() & other.keys()) if place]
    values = [", ".join(f"{place}: {line[place]:.1f}" for place in both) for line in (one, other)]
    return f"| {module} | {values[0]} | {values[1]} | {ahead[-1] if ahead else 'none'} |"


def style(axes: Axes) -> None:
    """Removes what distracts from the curves."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    runs = read_runs(Path(sys.argv[1]))[0]
    rows = [make_row(name, runs) for name in convergence.ROWS]
    six = [row for row in rows if row.name in convergence.SIX and row.runs]
    four = [row for row in rows if row.name in convergence.FOUR and row.runs]
    draw_drift(six, HERE / "convergence_drift.png")
    text = [*drift_table([*six, *four]), "", "![Drift](convergence_drift.png)", ""]
    if len(four) == len(convergence.FOUR):
        text += draw_passes(four, HERE / "convergence_passes.png")
        text += ["", "![Passes](convergence_passes.png)", ""]
    page, (begin, end) = (
        HERE / "convergence.md",
        (f"<!-- diagnostics{x} -->\n" for x in ("", " end")),
    )
    old = page.read_text()
    if begin not in old:
        old += f"\n{begin}{end}"
    head, tail = old.partition(begin)[0], old.partition(end)[2]
    page.write_text(f"{head}{begin}\n" + "\n".join(text) + f"\n{end}{tail}")
    print("\n".join(text))


if __name__ == "__main__":
    main()
