"""Short training runs of a narrow network, shared by the benchmarks of accuracy and of codecs."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dgl_jax.config import default_config, make_settings
from dgl_jax.data import Source, make_source
from dgl_jax.train import train_and_evaluate

MODULES = 6
SLOWED = 3  # index of the slowed module, as in the authors' published example


def add_flags(flags: argparse.ArgumentParser, workdir: str) -> None:
    """Adds flags for the data, the size of the runs, and the rows that this process trains."""
    flags.add_argument("--data_dir", default="", help="a prepared TFDS directory")
    flags.add_argument("--images", type=int, default=10_000)
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--epochs", type=float, default=16.0)
    flags.add_argument("--part", default="0/1", help="I/N: train every N-th row, starting at row I")
    flags.add_argument("--workdir", default=workdir)


def config(args: argparse.Namespace, seed: int) -> ConfigDict:
    """Returns the authors' asynchronous experiment with a narrow network and fewer images."""
    config = default_config()
    config.seed = seed
    config.data.name, config.data.dir = "cifar10", args.data_dir
    config.data.augment = "crop_flip"
    config.data.train_examples = args.images
    config.model.name, config.model.width, config.model.modules = "cnn6_replay", args.width, MODULES
    config.model.head = "mlp"
    config.schedule.name = "cosine"
    config.train.epochs = args.epochs
    config.eval.every = 0
    config.checkpoint.every = 5 * (args.images // config.data.batch_size)
    config.checkpoint.keep = 1
    config.engine.name = "fused"
    return config


def source(args: argparse.Namespace) -> Source:
    """Returns the data source that these runs train on."""
    settings = make_settings(config(args, seed=0))
    return make_source(settings.data, settings.seed)


def slow(
    config: ConfigDict, slowdown: float, ring_size: int, rule: str = "least_used_latest"
) -> None:
    """Changes a run to asynchronous training with one slowed module."""
    config.engine.name = "simulated"
    config.engine.slowdown = tuple(slowdown if k == SLOWED else 1.0 for k in range(MODULES))
    config.replay.size, config.replay.rule = ring_size, rule


def folder(name: str, args: argparse.Namespace) -> Path:
    """Returns the workdir of a row; it contains summary.json once the row is finished."""
    return Path(args.workdir) / name.replace(", ", "-").replace(" ", "_")


def train(config: ConfigDict, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a row, deletes its checkpoints (large, as they hold rings) and returns its summary."""
    workdir = folder(name, args)
    summary = train_and_evaluate(config, workdir).to_dict()
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    print(name, round(100 * summary["modules"][-1]["test_accuracy"], 2), flush=True)
    return json.loads(json.dumps(summary))
