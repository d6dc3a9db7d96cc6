"""The training run that the accuracy tables of asynchrony and of codecs have in common: narrow, short, equal for every row."""

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
SLOWED = 3  # the fourth of six modules, as in the authors' published example


def add_flags(flags: argparse.ArgumentParser, workdir: str) -> None:
    """Data, size of the runs, and which share of the rows this process takes."""
    flags.add_argument("--data_dir", default="", help="a prepared TFDS directory")
    flags.add_argument("--images", type=int, default=10_000)
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--epochs", type=float, default=16.0)
    flags.add_argument("--part", default="0/1", help="I/N: every N-th row, beginning with the I-th")
    flags.add_argument("--workdir", default=workdir)


def config(args: argparse.Namespace, seed: int) -> ConfigDict:
    """The network and heads of the authors' asynchronous experiments, narrowed, on a subset of the images."""
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
    """The images of these runs."""
    settings = make_settings(config(args, seed=0))
    return make_source(settings.data, settings.seed)


def slow(
    config: ConfigDict, slowdown: float, packets: int, rule: str = "least_used_latest"
) -> None:
    """Makes a run asynchronous, one of its modules slowed."""
    config.engine.name = "simulated"
    config.engine.slowdown = tuple(slowdown if k == SLOWED else 1.0 for k in range(MODULES))
    config.replay.size, config.replay.rule = packets, rule


def folder(name: str, args: argparse.Namespace) -> Path:
    """Where a row is trained; holds summary.json once it is finished."""
    return Path(args.workdir) / name.replace(", ", "-").replace(" ", "_")


def train(config: ConfigDict, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The summary of a row; its checkpoints, which hold the rings, go once it is finished."""
    workdir = folder(name, args)
    summary = train_and_evaluate(config, workdir).to_dict()
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    print(name, round(100 * summary["modules"][-1]["test_accuracy"], 2), flush=True)
    return json.loads(json.dumps(summary))
