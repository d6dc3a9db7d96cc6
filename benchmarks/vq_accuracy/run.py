"""Test accuracy with each codec and without one, in synchronous and asynchronous training.

python benchmarks/vq_accuracy/run.py --data_dir=PATH [--part=0/2] [--write]

Network, images and budget are the same as in `benchmarks/async_accuracy`, whose result.json has the
rows without a codec. Finished rows are not trained again: `--part=0/2` and `--part=1/2` can share
the rows between two processes, and a last call with --write makes the table.
"""

import argparse
import json
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

BASE = Path(__file__).parents[1] / "async_accuracy" / "result.json"
GOAL = 0.5  # percentage points that vq may lose at a compression of 32
# Names of the rows without a codec in the result of `async_accuracy`, by asynchronous or not.
WITHOUT = {False: "fused, seed {}", True: "S 1.2, M 50, least_used_latest, seed {}"}


class Row(NamedTuple):
    """Training run of the table."""

    codec: str
    dims: int
    asynchronous: bool
    seed: int
    stages: int = 1

    @property
    def name(self) -> str:
        size = f" D {self.dims}" if self.codec == "vq" else ""
        size += f" S {self.stages}" if self.stages > 1 else ""
        training = "asynchronous" if self.asynchronous else "synchronous"
        return f"{self.codec}{size}, {training}, seed {self.seed}"


ROWS = (
    Row("vq", 8, False, 0),
    Row("vq", 4, False, 0),
    Row("vq", 16, False, 0),
    Row("vq", 8, True, 0),
    Row("vq", 2, False, 0),
    Row("int8", 8, False, 0),
    Row("vq", 8, False, 1),
    Row("vq", 8, False, 2),
    Row("bf16", 8, False, 0),
    Row("vq", 8, True, 1),
    Row("vq", 8, True, 2),
    Row("vq", 16, False, 0, 2),
    Row("vq", 16, False, 1, 2),
    Row("vq", 16, False, 2, 2),
)


def train(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a row and returns its summary."""
    config = small_runs.config(args, row.seed)
    config.codec.name, config.codec.dims, config.codec.stages = row.codec, row.dims, row.stages
    if row.asynchronous:
        small_runs.slow(config, 1.2, 50)
    return small_runs.train(config, row.name, args)


def without(settings: dict[str, Any]) -> dict[Row, dict[str, Any]]:
    """Reads the rows without a codec from the result of `async_accuracy`."""
    other = json.loads(BASE.read_text())
    if other["settings"] != settings:
        raise SystemExit(f"{BASE}: was made with {other['settings']}, but this run uses {settings}")
    rows = [
        Row("identity", 1, asynchronous, seed)
        for asynchronous in (False, True)
        for seed in range(3)
    ]
    return {row: other["runs"][WITHOUT[row.asynchronous].format(row.seed)] for row in rows}


def summarize(summaries: dict[Row, dict[str, Any]]) -> list[dict[str, Any]]:
    """Combines the seeds of each setting into one entry of the table."""
    result = []
    order = ["identity", "bf16", "int8", "vq"]
    settings = {(*row[:3], row.stages) for row in summaries}
    for setting in sorted(settings, key=lambda s: (s[2], order.index(s[0]), s[3], s[1])):
        runs = {
            row.seed: summary
            for row, summary in summaries.items()
            if (*row[:3], row.stages) == setting
        }
        last = {seed: 100 * run["modules"][-1]["test_accuracy"] for seed, run in runs.items()}
        base = {
            seed: 100
            * summaries[Row("identity", 1, setting[2], seed)]["modules"][-1]["test_accuracy"]
            for seed in runs
        }
        first = runs[min(runs)]
        wire, raw = (sum(first[f"{kind}_bytes_per_image"]) for kind in ("wire", "raw"))
        entry: dict[str, Any] = {
            "codec": setting[0],
            "dims": setting[1],
            "asynchronous": setting[2],
        }
        entry |= {"stages": setting[3], "seeds": len(runs)}
        entry |= {
            "test_accuracy": [round(x, 2) for x in last.values()],
            "mean": round(statistics.mean(last.values()), 2),
        }
        entry["loss_of_points"] = [round(base[seed] - last[seed], 2) for seed in runs]
        entry["mean_loss_of_points"] = round(
            statistics.mean(base[seed] - last[seed] for seed in runs), 2
        )
        entry |= {
            "compression": round(raw / wire, 2),
            "codec_error": [round(e, 4) for e in first["codec_error"]],
        }
        result.append(entry | {"ring_bytes": first.get("ring_bytes")})
    return result


def picture(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots accuracy against compression."""
    figure = Figure(figsize=(8.6, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for asynchronous, color, training in (
        (False, "#0072b2", "synchronous"),
        (True, "#d55e00", "asynchronous, S = 1.2, M = 50"),
    ):
        group = [e for e in entries if e["asynchronous"] == asynchronous]
        plain = next(e for e in group if e["codec"] == "identity")
        axes.axhspan(
            min(plain["test_accuracy"]),
            max(plain["test_accuracy"]),
            color=color,
            alpha=0.12,
            linewidth=0,
        )
        axes.axhline(plain["mean"], color=color, linewidth=1.0, linestyle="--")
        for stages, marker, label in ((1, "o-", training), (2, "^", "two stages")):
            line = sorted(
                (e for e in group if e["codec"] == "vq" and e["stages"] == stages),
                key=lambda e: e["compression"],
            )
            if not line:
                continue
            axes.plot(
                [e["compression"] for e in line],
                [e["mean"] for e in line],
                marker,
                color=color,
                label=f"vq, {label}",
            )
        for e in group:
            axes.plot(
                [e["compression"]] * e["seeds"], e["test_accuracy"], "_", color=color, markersize=9
            )
            if e["codec"] in ("bf16", "int8"):
                axes.plot(e["compression"], e["mean"], "s", color=color)
                axes.annotate(
                    e["codec"],
                    (e["compression"], e["mean"]),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=9,
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_xlabel("compression of all hops together, including labels, ids and codebooks")
    axes.set_ylabel("test accuracy of the last module, %")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    flags = harness.parser(__doc__)
    small_runs.add_flags(flags, "runs/vq_accuracy")
    flags.add_argument(
        "--finished", action="store_true", help="use only finished rows and train none"
    )
    args = flags.parse_args()
    part, parts = map(int, args.part.split("/"))
    rows = [
        row
        for row in ROWS[part::parts]
        if not args.finished or (small_runs.folder(row.name, args) / "summary.json").exists()
    ]
    summaries = {row: train(row, args) for row in rows}
    if parts > 1:
        return
    settings = {key: getattr(args, key) for key in ("images", "width", "epochs")}
    entries = summarize(without(settings) | summaries)
    harness.table(
        [
            "codec",
            "D",
            "stages",
            "training",
            "compression",
            "test accuracy, %",
            "loss, points",
            "seeds",
        ],
        [
            [
                *(
                    (e["codec"], e["dims"], e["stages"])
                    if e["codec"] == "vq"
                    else (e["codec"], "", "")
                ),
                "asynchronous" if e["asynchronous"] else "synchronous",
                *(e["compression"], e["mean"], e["mean_loss_of_points"], e["seeds"]),
            ]
            for e in entries
        ],
    )
    runs = {row.name: summary for row, summary in summaries.items()}
    harness.finish(
        __file__,
        {"settings": settings, "goal_points_at_32x": GOAL, "rows": entries, "runs": runs},
        args.write,
    )
    if args.write:
        picture(entries, Path(__file__).with_name("accuracy.png"))


if __name__ == "__main__":
    main()
