"""Sizes, seeds and learning rates that the claims share.

Every claim has three sweeps, chosen by the argument after the file's name:

    --sweep=configs/claims/heads.py:rates   every row with three learning rates, one seed
    --sweep=configs/claims/heads.py:small   every row with the chosen rate and several seeds
    --sweep=configs/claims/heads.py:full    as `rates`, at the paper's size, for one GPU

`rates` and `small` share a workdir: runs that both contain are trained once. The rate of a row is
the one with the best validation accuracy of the last module; the file of the claim lists the rates
of `small`. The rates of another size may be others, so `full` tries all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dgl_jax.config import default_config
from dgl_jax.configs.bases import cifar10
from dgl_jax.errors import UserError

Rows = Iterator[tuple[str, ConfigDict]]
Variants = dict[str, dict[str, Any]]  # fields that differ, by the name of the row
RATES = (0.01, 0.03, 0.1)
SIZES = ("rates", "small", "full")


def sweep(
    base: Callable[[bool], ConfigDict],
    variants: Variants,
    size: str | None,
    chosen: Mapping[str, float],
    *,
    rates: tuple[float, ...] = RATES,
    seeds: int = 3,
    default: float = 0.03,
) -> Rows:
    """Yields the rows of a claim.

    Args:
      base: returns the configuration that the rows share; its argument is True for the full size.
      variants: such as `{"backprop": {"method.name": "backprop"}}`.
      size: one of `SIZES`; None for `small`.
      chosen: learning rate of each row of `small`; rows that it lacks use `default`.
      rates: learning rates of the sweeps `rates` and `full`.
      seeds: number of seeds of the sweep `small`; the others have one.
      default: see `chosen`.

    Yields:
      Names such as `mlp/lr=0.1/seed=0`, and configurations.

    Raises:
      UserError: there is no such size.
    """
    size = size or "small"
    if size not in SIZES:
        raise UserError(f"--sweep=...:{size}: must be one of {', '.join(SIZES)}")
    for name, fields in variants.items():
        rate = chosen.get(name, default)
        runs = [(rate, s) for s in range(seeds)] if size == "small" else [(r, 0) for r in rates]
        for learning_rate, seed in runs:
            config = base(size == "full")
            config.update_from_flattened_dict(fields)
            config.optimizer.learning_rate, config.seed = learning_rate, seed
            yield f"{name}/lr={learning_rate:g}/seed={seed}", config


def small_cifar10() -> ConfigDict:
    """Returns the small size: 10,000 images of CIFAR-10, width 16, 10 epochs, cosine schedule."""
    config = default_config()
    config.data.name = "cifar10"
    config.data.augment = "crop_flip"
    config.data.train_examples = 10_000
    config.model.width = 16
    config.model.head = "mlp_sr"
    config.schedule.name = "cosine"
    config.train.epochs = 10.0
    config.checkpoint.every = 390  # five epochs
    config.checkpoint.keep = 1
    return config


def paper_cifar10() -> ConfigDict:
    """Returns the full size: all images, 50 epochs, a fifth of the rate every 15 epochs."""
    config = cifar10()
    config.schedule.boundaries = (15.0, 30.0, 45.0)
    config.schedule.factor = 0.2
    config.train.epochs = 50.0
    config.checkpoint.keep = 1
    return config
