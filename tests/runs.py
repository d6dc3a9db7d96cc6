"""A training run small enough for tests, and how to compare what two runs leave behind."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dgl_jax.config import Settings, default_config
from dgl_jax.data.info import DatasetInfo
from dgl_jax.replay import Ring
from dgl_jax.run.build import choose_cuts, make_blocks, make_spec
from dgl_jax.run.restore import load_trained
from dgl_jax.spec import TrainSpec

# The same run on the command line.
FIELDS: dict[str, Any] = {
    "data.name": "synthetic",
    "data.image_size": 8,
    "data.batch_size": 8,
    "data.train_examples": 48,  # six steps an epoch
    "data.augment": "crop_flip",
    "model.name": "cnn4",
    "model.width": 4,
    "model.modules": 2,
    "model.head": "linear",
    "optimizer.learning_rate": 0.05,
    "train.steps": 12,
    "checkpoint.every": 4,
    "eval.every": 6,
    "log.every": 3,
}


def small_config(**fields: Any) -> ConfigDict:
    """The small run; `fields` with `__` for the dot. The engine `backprop` is back-propagation under `fused`."""
    config = default_config()
    if fields.get("engine__name") == "backprop":
        fields |= {"engine__name": "fused", "method__name": "backprop"}
    for name, value in (FIELDS | {k.replace("__", "."): v for k, v in fields.items()}).items():
        group, _, leaf = name.rpartition(".")
        setattr(config[group] if group else config, leaf, value)
    return config


def spec_of(settings: Settings, info: DatasetInfo, schedule: Any = None) -> TrainSpec:
    """What the settings train, cut as they say."""
    return make_spec(settings, info, choose_cuts(settings, make_blocks(settings, info)), schedule)


def arrays(workdir: Path) -> list[np.ndarray]:
    """Everything that the newest checkpoint holds of the modules, as host arrays."""
    modules = load_trained(workdir).restored.state.modules
    return [
        np.asarray(x)
        for m in modules
        for x in jax.tree.leaves(m.replace(rng=jax.random.key_data(m.rng)))
    ]


def watch_labels(monkeypatch: Any, source: Any) -> list[bool]:
    """For every packet that will be read from a ring: whether ids and labels are those of the batch its header names."""
    right: list[bool] = []
    sample = Ring.sample

    def spy(self: Ring) -> Any:
        found = sample(self)
        if found is not None:
            batch = source.batch(found.header.sequence)
            right.append(
                all(
                    np.array_equal(rows, batch.context[name])
                    for name, rows in found.message.context.items()
                )
            )
        return found

    monkeypatch.setattr(Ring, "sample", spy)
    return right


def records(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines
    ]


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits and wrote the same metrics."""
    pairs = list(zip(arrays(one), arrays(other), strict=True))
    return all(np.array_equal(a, b) for a, b in pairs) and records(one) == records(other)
