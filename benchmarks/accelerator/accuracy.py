"""Group e: test accuracy on a folder of images after as many epochs as the time allows.

All runs start together and share the accelerator, so that each has the same time. They are started
with `launch.py`; this process stays on the CPU.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accelerator.common import Fields, finish, launching, start
from benchmarks.accelerator.rows import Figures, Job, Row, Size, Skipped

# Messages in bfloat16: 16 channels or 32 bytes become one byte.
RUNS: Mapping[str, Fields] = {
    "DGL": {},
    "back-propagation": {"method.name": "backprop"},
    "asynchronous": {"engine.name": "threads", "replay.size": 10},
    "vq at 32x": {"engine.name": "pipeline", "codec.name": "vq", "codec.dims": 16},
}
_SLOWEST = 0.15  # images per second of the slowest run, over the rate of `fused` alone
_GUESS = {"full": 25_000.0, "small": 3_000.0, "smoke": 1_000.0}  # images/s, if not measured
_START = 60.0  # seconds for imports and compilation
_END = 10.0  # seconds for the test at the end
_EXAMPLES = {"full": 0, "small": 512, "smoke": 128}  # training images; 0: all
_MOST = 50  # epochs


def rows(size: Size) -> list[Row]:
    """Returns the rows of this group."""
    return [
        Row(
            f"accuracy: {name}",
            "e",
            partial(_accuracy, name),
            cost=240 if name == "DGL" else 5,
            process="accuracy",
            rank=2,
            host=True,
            patient=True,
        )
        for name in RUNS
    ]


def _epochs(job: Job, images: int) -> int:
    """Returns the number of epochs for which the time suffices."""
    rate = _GUESS[job.size.name]
    for figures in job.results.values():
        if [figures.get(k) for k in ("engine", "method", "network")] == ["fused", "dgl", "cnn6"]:
            rate = figures["images_per_second"]["median"]
            break
    epochs = (job.left - _START - _END) * rate * _SLOWEST / images
    return max(1, min(_MOST, int(epochs)))


def _begin(job: Job) -> dict[str, tuple[subprocess.Popen, Path, int]]:
    """Starts all runs, each with its workdir and its number of epochs."""
    images = Path(job.data_dir) / "train"
    if not job.data_dir:
        raise Skipped("no --data_dir")
    if not images.is_dir():
        raise Skipped(f"--data_dir={job.data_dir}: has no folder train")
    count = _EXAMPLES[job.size.name] or sum(1 for path in images.rglob("*.*") if path.is_file())
    epochs = _epochs(job, count)
    children = {}
    for name, fields in RUNS.items():
        workdir = job.folder / "accuracy" / name.replace(" ", "_")
        shared: dict[str, Any] = {
            "data.name": "folder",
            "data.dir": str(Path(job.data_dir).resolve()),
            "data.train_examples": _EXAMPLES[job.size.name],
            "data.image_size": 32,
            "model.width": max(16, job.size.width),
            "model.dtype": "bfloat16",
            "model.modules": job.size.modules,
            "optimizer.learning_rate": 0.05,
            "schedule.name": "cosine",
            "train.epochs": epochs,
        }
        command, log = launching(shared | dict(fields), workdir), workdir.with_suffix(".log")
        # Without the variable, the first run would take most of the memory for itself.
        child = start(command, log, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        children[name] = child, workdir, epochs
    return children


def _accuracy(name: str, job: Job) -> Figures:
    if "accuracy" not in job.shared:
        job.shared["accuracy"] = _begin(job)
    child, workdir, epochs = job.shared["accuracy"][name]
    try:
        child.wait(timeout=max(0.0, job.left - _END))
    except subprocess.TimeoutExpired:
        child.kill()
        print(workdir.with_suffix(".log").read_text(errors="replace"), file=sys.stderr)
        return _reached(workdir) | {"epochs_planned": epochs, "note": "stopped before its end"}
    finish(child, workdir.with_suffix(".log"))
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "epochs": summary["epochs"],
        "test_accuracy": summary["modules"][-1]["test_accuracy"],
        "ensemble_accuracy": summary["ensemble_accuracy"],
        "images_per_second": summary["images_per_second"],
        "compression": _compression(summary),
    }


def _compression(summary: Figures) -> float | None:
    """Returns the bytes of all messages without a codec, over those with it."""
    wire = sum(summary["wire_bytes_per_image"])
    return round(sum(summary["raw_bytes_per_image"]) / wire, 2) if wire else None


def _reached(workdir: Path) -> Figures:
    """Returns the newest validation accuracy of the last module of a run that was stopped."""
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for line in reversed(lines):
        values = json.loads(line)
        accuracies = [
            v for k, v in values.items() if re.fullmatch(r"validation/module_\d+/accuracy", k)
        ]
        if accuracies:
            return {"epochs": values["epoch"], "validation_accuracy": accuracies[-1]}
    raise Skipped("ran out of time before the first evaluation")
