"""Test accuracy of asynchronous and synchronous training, by ring size, slowdown and replay rule.

python benchmarks/async_accuracy/run.py --data_dir=PATH [--part=0/2] [--write]

Every row makes the same number of updates per module. A finished row is not trained again and an
interrupted one is resumed, so that `--part=0/2` and `--part=1/2` can share the rows between two
processes and a last call with --write makes the table.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import small_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from small_runs import SLOWED


class Row(NamedTuple):
    """Training run of the table; `slowdown` 0 means synchronous training."""

    slowdown: float
    ring_size: int
    rule: str
    seed: int

    @property
    def name(self) -> str:
        if not self.slowdown:
            return f"fused, seed {self.seed}"
        return f"S {self.slowdown:g}, M {self.ring_size}, {self.rule}, seed {self.seed}"


PAPER, CODE = "least_used_latest", "released"
ROWS = (
    Row(0, 0, "", 0),
    Row(1.2, 50, PAPER, 0),
    Row(1.2, 1, PAPER, 0),
    Row(2.0, 50, PAPER, 0),
    Row(1.2, 10, PAPER, 0),
    Row(1.0, 50, PAPER, 0),
    Row(1.2, 50, CODE, 0),
    Row(2.0, 50, CODE, 0),
    Row(1.5, 50, PAPER, 0),
    *(row for seed in (1, 2) for row in (Row(0, 0, "", seed), Row(1.2, 50, PAPER, seed))),
)


def train(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a row and returns its summary."""
    config = small_runs.config(args, row.seed)
    if row.slowdown:
        small_runs.slow(config, row.slowdown, row.ring_size, row.rule)
    return small_runs.train(config, row.name, args)


def summarize(summaries: dict[Row, dict[str, Any]]) -> list[dict[str, Any]]:
    """Combines the seeds of each setting into one entry of the table."""
    settings = list(dict.fromkeys(row[:3] for row in summaries))
    result = []
    for setting in settings:
        slowdown, ring_size, rule = setting
        runs = [summary for row, summary in summaries.items() if row[:3] == setting]
        last = [100 * run["modules"][-1]["test_accuracy"] for run in runs]
        ensemble = [100 * run["ensemble_accuracy"] for run in runs]
        entry: dict[str, Any] = {
            "slowdown": slowdown,
            "ring_size": ring_size,
            "rule": rule,
            "seeds": len(runs),
        }
        entry |= {
            "test_accuracy": [round(x, 2) for x in last],
            "mean": round(statistics.mean(last), 2),
        }
        entry |= {
            "ensemble": round(statistics.mean(ensemble), 2),
            "updates": runs[0]["modules"][0]["updates"],
        }
        if slowdown:
            entry["age_of_slowed"] = round(
                statistics.mean(run["staleness"][SLOWED] for run in runs), 2
            )
            entry["reuse_above_slowed"] = round(
                statistics.mean(run["reuse"][SLOWED + 1] for run in runs), 2
            )
        result.append(entry)
    return result


def picture(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots accuracy against ring size and slowdown, with a band for synchronous training."""
    figure = Figure(figsize=(8.6, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    fused = next(e for e in entries if not e["slowdown"])
    for axes in (left, right):
        axes.axhline(
            fused["mean"],
            color="#555555",
            linewidth=1.2,
            label=f"synchronous, {fused['seeds']} seeds",
        )
        axes.axhspan(
            min(fused["test_accuracy"]),
            max(fused["test_accuracy"]),
            color="#555555",
            alpha=0.15,
            linewidth=0,
        )
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)

    def select(rule: str, **fixed: float) -> list[dict[str, Any]]:
        return [
            e for e in entries if e["rule"] == rule and all(e[k] == v for k, v in fixed.items())
        ]

    for axes, key, fixed, label in (
        (left, "ring_size", {"slowdown": 1.2}, "messages per ring M (S = 1.2)"),
        (right, "slowdown", {"ring_size": 50}, "slowdown S of module 3 (M = 50)"),
    ):
        for rule, color, mark in ((PAPER, "#0072b2", "o"), (CODE, "#d55e00", "s")):
            line = sorted(select(rule, **fixed), key=lambda e: e[key])
            axes.plot(
                [e[key] for e in line],
                [e["mean"] for e in line],
                mark + "-",
                color=color,
                label=rule,
            )
            for e in line:
                axes.plot([e[key]] * e["seeds"], e["test_accuracy"], "_", color=color, markersize=9)
        axes.set_xlabel(label)
    left.set_xscale("log")
    left.set_xticks([1, 10, 50], ["1", "10", "50"])
    left.minorticks_off()
    left.set_ylabel("test accuracy of the last module, %")
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    flags = harness.parser(__doc__)
    small_runs.add_flags(flags, "runs/async_accuracy")
    args = flags.parse_args()
    part, parts = map(int, args.part.split("/"))
    summaries = {row: train(row, args) for row in ROWS[part::parts]}
    if parts > 1:
        return
    entries = summarize(summaries)
    harness.table(
        [
            "S of module 3",
            "M",
            "rule",
            "test accuracy, %",
            "seeds",
            "mean age of its messages",
            "reads per message above it",
        ],
        [
            [e["slowdown"] or "fused", e["ring_size"] or "", e["rule"], e["mean"], e["seeds"]]
            + [e.get(key, "") for key in ("age_of_slowed", "reuse_above_slowed")]
            for e in entries
        ],
    )
    chosen = {key: getattr(args, key) for key in ("images", "width", "epochs")}
    runs = {row.name: summary for row, summary in summaries.items()}
    harness.finish(__file__, {"settings": chosen, "rows": entries, "runs": runs}, args.write)
    if args.write:
        picture(entries, Path(__file__).with_name("accuracy.png"))


if __name__ == "__main__":
    main()
