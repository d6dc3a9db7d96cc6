"""Configuration of a small training run, and functions that compare the results of two runs."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dgl_jax.config import Settings, default_config
from dgl_jax.data.info import DatasetInfo
from dgl_jax.models import register_network
from dgl_jax.models.blocks import ConvBlock
from dgl_jax.replay import Ring
from dgl_jax.run.build import choose_cuts, make_spec
from dgl_jax.run.parts import make_blocks
from dgl_jax.run.restore import load_trained
from dgl_jax.spec import TrainSpec
from dgl_jax.train import train_and_evaluate

# One block for each of two modules: it compiles in half the time of the smallest shipped network.
register_network(
    "two_blocks",
    lambda width, classes, dtype: [
        ConvBlock(width, dtype=dtype),
        ConvBlock(2 * width, pool=True, dtype=dtype),
    ],
)

# Options of `vq` in tests that compare engines: the parts left out take long to compile.
# `test_engines` compares engines with all parts.
LEAN_VQ: dict[str, Any] = {"start": "sample", "restart": 0.0, "samples": 0}

# Fields of the small run; tests of the command line pass them as flags.
FIELDS: dict[str, Any] = {
    "data.name": "synthetic",
    "data.image_size": 8,
    "data.batch_size": 8,
    "data.train_examples": 48,  # six steps per epoch
    "data.validation_fraction": 0.02,  # 40 examples
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
    """Returns the configuration of the small run, with `two_blocks` if they suffice.

    Args:
      **fields: fields to change, with `__` in place of the dot. `engine__name="backprop"` selects
        back-propagation under the engine `fused`.
    """
    config = default_config()
    if fields.get("engine__name") == "backprop":
        fields |= {"engine__name": "fused", "method__name": "backprop"}
    chosen = {name.replace("__", "."): value for name, value in fields.items()}
    if chosen.get("model.modules", 2) <= 2 and chosen.get("model.split", "count") == "count":
        chosen = {"model.name": "two_blocks"} | chosen
    for name, value in (FIELDS | chosen).items():
        group, _, leaf = name.rpartition(".")
        setattr(config[group] if group else config, leaf, value)
    return config


def spec_of(settings: Settings, info: DatasetInfo, schedule: Any = None) -> TrainSpec:
    """Returns the spec of a run with these settings, cut into modules as they specify."""
    return make_spec(settings, info, choose_cuts(settings, make_blocks(settings, info)), schedule)


def arrays(workdir: Path) -> list[np.ndarray]:
    """Returns all arrays of the modules' states in the newest checkpoint."""
    modules = load_trained(workdir).restored.state.modules
    return [
        np.asarray(x)
        for m in modules
        for x in jax.tree.leaves(m.replace(rng=jax.random.key_data(m.rng)))
    ]


def watch_labels(monkeypatch: Any, source: Any) -> list[bool]:
    """Checks the ids and labels of every message that is read from a ring from now on.

    Args:
      monkeypatch: replaces `Ring.sample` until it is undone.
      source: training data of the run.

    Returns:
      A list that grows with each message read: True if the message's context is equal to the
      context of the batch that its header names.
    """
    matches: list[bool] = []
    original = Ring.sample

    def checked_sample(self: Ring) -> Any:
        sample = original(self)
        if sample is not None:
            batch = source.batch(sample.header.sequence)
            matches.append(
                all(
                    np.array_equal(rows, batch.context[name])
                    for name, rows in sample.message.context.items()
                )
            )
        return sample

    monkeypatch.setattr(Ring, "sample", checked_sample)
    return matches


def records(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without the fields that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines
    ]


def same_run(one: Path, other: Path) -> bool:
    """Returns True if two runs ended with the same bits and wrote the same metrics."""
    pairs = list(zip(arrays(one), arrays(other), strict=True))
    return all(np.array_equal(a, b) for a, b in pairs) and records(one) == records(other)


def evaluated_run(path: Path, **fields: Any) -> Path:
    """Trains a short run with checkpoints 6 and 8, both of them evaluated, and returns its path."""
    fields = {"train__steps": 8, "checkpoint__every": 2, "eval__every": 6} | fields
    train_and_evaluate(small_config(**fields), path)
    return path
