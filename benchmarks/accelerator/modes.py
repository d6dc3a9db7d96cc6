"""Group a: every engine, codec, method and mode for a few steps of a small network."""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.accelerator.common import Fields, configured
from benchmarks.accelerator.rows import Figures, Job, Row, Size, Skipped
from dgl_jax import cli, evaluate
from dgl_jax.config.registry import CODECS, ENGINES, METHODS
from dgl_jax.run import plots
from dgl_jax.tools import bench, export, plan, predict, report, sweep
from dgl_jax.train import train_and_evaluate

_FIELDS: Fields = {
    "data.name": "synthetic",
    "data.image_size": 8,
    "data.batch_size": 16,
    "data.train_examples": 64,
    "data.augment": "crop_flip",
    "model.name": "cnn4",
    "model.width": 8,  # the default codecs encode groups of eight channels
    "model.modules": 2,
    "model.head": "linear",
    "optimizer.learning_rate": 0.01,
    "train.steps": 4,
    "checkpoint.every": 4,
    "eval.every": 4,
    "log.every": 4,  # otherwise a dispatch has one step
}
_IMAGES = 3


def rows(size: Size) -> list[Row]:
    """Returns the rows of this group."""
    row = partial(Row, group="a", process="modes")
    return [
        *(
            row(f"engine {name}", measure=_trains(f"engine_{name}", {"engine.name": name}), cost=8)
            for name in ENGINES
        ),
        *(
            row(
                f"codec {name}",
                measure=_trains(f"codec_{name}", {"engine.name": "pipeline", "codec.name": name}),
                cost=8,
            )
            for name in CODECS
        ),
        *(
            row(f"method {name}", measure=_trains(f"method_{name}", {"method.name": name}), cost=6)
            for name in METHODS
        ),
        *(
            row(f"mode {name}", measure=partial(_mode, name), cost=4)
            for name in cli._MODES
            if name != "sweep"
        ),
        # Its runs are other processes, beside which this one stays on the CPU.
        row("mode sweep", measure=partial(_mode, "sweep"), cost=30, process="sweep", host=True),
    ]


def _train(job: Job, fields: Fields, name: str = "mode_train") -> Path:
    """Trains a run unless it is finished, and returns its workdir, which has the given name."""
    settings = configured(dict(_FIELDS) | dict(fields), strict=False)
    workdir = job.folder / "modes" / name
    train_and_evaluate(settings, workdir)
    return workdir


def _trains(name: str, fields: Fields) -> Callable[[Job], Figures]:
    """Returns a function that trains a run and returns seconds, last loss and test accuracy."""

    def measure(job: Job) -> Figures:
        begin = time.perf_counter()
        workdir = _train(job, fields, name)
        seconds = time.perf_counter() - begin
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses = [v for line in lines for k, v in line.items() if k.endswith("/loss")]
        summary = json.loads((workdir / "summary.json").read_text())
        accuracies = [module["test_accuracy"] for module in summary["modules"]]
        if not losses or not all(map(math.isfinite, losses)):
            raise Skipped(f"a loss is missing or not finite: {losses}")
        return {
            "seconds": round(seconds, 2),
            "loss": round(losses[-1], 4),
            "test_accuracy": accuracies,
            "steps": summary["steps"],
        }

    return measure


def _evaluated(job: Job) -> Any:
    return evaluate.evaluate_run(_train(job, {}))["test/module_1/accuracy"]


def _predicted(job: Job) -> Any:
    workdir = _train(job, {})
    for k in range(_IMAGES):
        image = np.full((20, 20, 3), 60 * k, np.uint8)
        Image.fromarray(image).save(workdir / f"{k}.png")
    table = workdir / "labels.csv"
    predict.predict_run(workdir, "newest", [str(workdir / "*.png")], table)
    return table.read_text().count("\n") - 1


def _exported(job: Job) -> Any:
    folder = export.export_run(_train(job, {}))
    return len(export.load_exported(folder).spec.modules)


def _benched(job: Job) -> Any:
    return bench.bench(configured(_FIELDS), 5)["images_per_second"]


def _planned(job: Job) -> Any:
    settings = configured(dict(_FIELDS) | {"model.split": "time"})
    return json.loads(plan.plan_run(settings, as_json=True))["ticks_per_second"]


def _swept(job: Job) -> Any:
    rows = [(f"seed={seed}", configured(dict(_FIELDS) | {"seed": seed})) for seed in range(2)]
    return len(sweep.sweep(rows, job.folder / "sweep", 1, estimate=False).names()["finished"])


def _reported(job: Job) -> Any:
    _train(job, {})
    page, _ = report.report_runs(job.folder / "modes", job.folder / "report.html")
    return page.stat().st_size


# By mode: the name of its figure, and the function that returns it.
MODES: dict[str, tuple[str, Callable[[Job], Any]]] = {
    "train": ("workdir", lambda job: _train(job, {}).name),
    "eval": ("test_accuracy", _evaluated),
    "predict": ("images", _predicted),
    "export": ("modules", _exported),
    "plot": ("pictures", lambda job: len(plots.plot(_train(job, {})))),
    "bench": ("images_per_second", _benched),
    "plan": ("ticks_per_second", _planned),
    "sweep": ("finished_runs", _swept),
    "report": ("bytes", _reported),
}


def _mode(name: str, job: Job) -> Figures:
    if name not in MODES:
        raise Skipped("this benchmark has no row for this mode")
    figure, measure = MODES[name]
    begin = time.perf_counter()
    value = measure(job)
    return {"seconds": round(time.perf_counter() - begin, 2), figure: value}
