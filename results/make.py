"""Writes the table and the picture of a claim from the runs of its sweeps `rates` and `small`.

    python results/make.py WORKDIR CLAIM

CLAIM is the name of a file in configs/claims/. Writes results/CLAIM.md and results/CLAIM.png, and
results/CLAIM_modules.png if the claim has `LINES`: rows by label and number of modules. Runs that
are missing or not finished are left out and counted.

results/CLAIM.jsonl holds the finished runs: configuration, summary, and the metrics on validation
and test images. Runs of this file that WORKDIR lacks are written there first, without checkpoints,
so that a sweep in WORKDIR trains only what is missing, and `--mode=report` shows everything.
Finished runs of WORKDIR are then added to the file.
"""

import importlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgl_jax.configs.claims._common import Variants
from dgl_jax.tools.report_runs import Run, read_runs

HERE = Path(__file__).parent
FILES = ("config", "summary")
KEPT = ("validation/", "test/")  # metrics in results/CLAIM.jsonl
# Of claims with diagnostics also these, with four digits.
PROBED = (
    "gradient_squared",
    "gradient_second_moment",
    "weighted_drift",
    "codec_error",
    "staleness",
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Row:
    """Runs of one row of a claim.

    Attributes:
      name: name of the row.
      rates: by learning rate, the validation accuracy of the last module with the first seed.
      chosen: learning rate with the highest one; None if there is no run.
      runs: finished runs with the chosen rate, one per seed.
    """

    name: str
    rates: dict[float, float]
    chosen: float | None
    runs: tuple[Run, ...]

    @property
    def modules(self) -> int:
        """Returns the number of modules of the runs."""
        return len(self.runs[0].summary["modules"])

    def accuracies(self, module: int = -1) -> list[float]:
        """Returns the test accuracy of a module for each seed, in percent."""
        values = [run.summary["modules"][module]["test_accuracy"] for run in self.runs]
        return [100 * value for value in values if value is not None]

    def text(self) -> str:
        """Returns mean and sample standard deviation of the last module's test accuracy."""
        values = self.accuracies()
        if len(values) < 2:
            return f"{values[0]:.2f}" if values else ""
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def last_module(run: Run) -> int:
    """Returns the index of a run's last module."""
    return len(run.summary["modules"]) - 1


def make_row(name: str, runs: Sequence[Run]) -> Row:
    """Collects the finished runs of a row."""
    mine = [run for run in runs if run.finished and run.name.startswith(f"{name}/lr=")]
    rates = {
        run.settings["optimizer.learning_rate"]: 100
        * run.curves["validation", last_module(run), "accuracy"][1][-1]
        for run in mine
        if run.seed == 0
    }
    chosen = max(rates, key=lambda rate: rates[rate], default=None)
    kept = [run for run in mine if run.settings["optimizer.learning_rate"] == chosen]
    return Row(name, rates, chosen, tuple(sorted(kept, key=lambda run: run.seed)))


def table(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of a Markdown table."""
    rates = sorted({rate for row in rows for rate in row.rates})
    header = ["row", *(f"validation, lr {rate:g}" for rate in rates)]
    header += ["test accuracy of the last module, %", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [f"{row.rates[rate]:.2f}" if rate in row.rates else "" for rate in rates]
        cells = [
            f"**{cell}**" if rate == row.chosen else cell
            for rate, cell in zip(rates, cells, strict=True)
        ]
        text = f"**{row.text()}**" if row.runs else ""
        line = [f"`{row.name}`", *cells, text, str(len(row.runs))]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def by_module(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of a Markdown table of all heads; empty if no row has several.

    It has the rows with the most modules, of each network if names begin with that of a network.
    """
    trained = [(row, row.name.rpartition("/")[0]) for row in rows if row.runs]
    most: dict[str, int] = {}
    for row, network in trained:
        most[network] = max(row.modules, most.get(network, 0))
    count = max(most.values(), default=0)
    wide = [row for row, network in trained if row.modules == most[network]]
    if count < 2 or not any(len(row.accuracies(0)) for row in wide):
        return []
    header = ["mean test accuracy, %", *(f"module {k}" for k in range(count))]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in wide:
        cells = [row.accuracies(k) if k < row.modules else [] for k in range(count)]
        texts = [f"{statistics.mean(values):.2f}" if values else "" for values in cells]
        lines.append("| " + " | ".join([f"`{row.name}`", *texts]) + " |")
    return lines


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draws test accuracy of every seed and, of few rows, validation accuracy over epochs."""
    few = len(rows) <= len(COLORS)
    size = (9.6, 4.2) if few else (6.4, 0.6 + 0.24 * len(rows))
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, width_ratios=(3, 2)) if few else [figure.subplots()]
    right = panels[-1]
    for place, row in enumerate(rows):
        color = COLORS[place] if few else COLORS[0]
        curves = [run.curves["validation", last_module(run), "accuracy"] for run in row.runs]
        length = min((len(values) for _, values in curves), default=0)
        means = [100 * statistics.mean(v[i] for _, v in curves) for i in range(length)]
        if curves and few:
            panels[0].plot(curves[0][0][:length], means, color=color, label=row.name)
        values = row.accuracies()
        right.plot(values, [place] * len(values), "o", color=color, markersize=4, alpha=0.6)
        if values:
            right.plot(statistics.mean(values), place, "|", color=color, markersize=16)
    right.set(xlabel="test accuracy of the last module, %")
    right.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    right.invert_yaxis()
    for axes in panels:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if few:
        panels[0].set(xlabel="epoch", ylabel="validation accuracy of the last module, %")
        panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def accuracy_by_modules(
    lines: Mapping[str, Mapping[int, str]], rows: Sequence[Row], path: Path
) -> None:
    """Draws the mean test accuracy of the last module against the number of modules.

    Args:
      lines: names of rows, by label of the line and number of modules.
      rows: all rows.
      path: file to write.
    """
    by_name = {row.name: row for row in rows}
    figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (label, names) in zip(COLORS, lines.items()):
        means = {
            modules: statistics.mean(values)
            for modules, name in names.items()
            if (values := by_name[name].accuracies())
        }
        axes.plot(means.keys(), means.values(), "o-", color=color, label=label)
    axes.set(xlabel="modules", ylabel="test accuracy of the last module, %")
    axes.set_xticks(sorted({modules for names in lines.values() for modules in names}))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def unpack(store: Path, workdir: Path) -> None:
    """Writes the stored runs that a workdir lacks."""
    for line in store.read_text().splitlines() if store.exists() else ():
        run = json.loads(line)
        folder = workdir / run["name"]
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        for name in FILES:
            (folder / f"{name}.json").write_text(json.dumps(run[name], indent=2) + "\n")
        lines = [json.dumps(line) + "\n" for line in run["metrics"]]
        (folder / "metrics.jsonl").write_text("".join(lines))


def kept(record: Mapping[str, float]) -> dict[str, float]:
    """Returns what is stored of a line of metrics; empty if nothing is."""
    if any(key.startswith(KEPT) for key in record):
        return dict(record)
    probed = {
        key: float(f"{value:.4g}")
        for key, value in record.items()
        if key.startswith(("diagnostics/", "final/")) and key.endswith(PROBED) and value is not None
    }
    return probed and {key: record[key] for key in ("step", "epoch")} | probed


def pack(runs: Sequence[Run], workdir: Path, store: Path) -> None:
    """Writes the finished runs, one per line."""
    lines = []
    for run in sorted((run for run in runs if run.finished), key=lambda run: run.name):
        folder = workdir / run.name
        metrics = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        content = {
            "name": run.name,
            **{name: json.loads((folder / f"{name}.json").read_text()) for name in FILES},
            "metrics": [line for record in metrics if (line := kept(record))],
        }
        lines.append(json.dumps(content) + "\n")
    store.write_text("".join(lines))


def main() -> None:
    workdir, claim = Path(sys.argv[1]), sys.argv[2]
    module = importlib.import_module(f"dgl_jax.configs.claims.{claim}")
    unpack(HERE / f"{claim}.jsonl", workdir)
    variants: Variants = module.ROWS
    # Claims may share a workdir.
    runs = [
        run
        for run in read_runs(workdir)[0]
        if any(run.name.startswith(f"{name}/lr=") for name in variants)
    ]
    pack(runs, workdir, HERE / f"{claim}.jsonl")
    rows = [make_row(name, runs) for name in variants]
    picture([row for row in rows if row.runs], HERE / f"{claim}.png")
    if lines := getattr(module, "LINES", None):
        accuracy_by_modules(lines, rows, HERE / f"{claim}_modules.png")
    text = [*table(rows), "", *by_module(rows)]
    missing = sum(not run.finished for run in runs)
    print("\n".join(text), f"\n\n{missing} runs are not finished", sep="")
    chosen = {row.name: row.chosen for row in rows if row.chosen is not None}
    print(f"CHOSEN = {chosen!r}")
    page = HERE / f"{claim}.md"
    begin, end = "<!-- table -->\n", "<!-- end -->\n"
    old = page.read_text() if page.exists() else f"# {claim}\n\n{begin}{end}"
    head, tail = old.partition(begin)[0], old.partition(end)[2]
    lines = "\n".join(text).strip()
    page.write_text(f"{head}{begin}\n{lines}\n\n![Accuracy]({claim}.png)\n\n{end}{tail}")


if __name__ == "__main__":
    main()
