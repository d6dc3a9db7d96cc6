r"""Claim: asynchronous training keeps its accuracy up to a slowdown of 1.2, and most of it up to 2.

    python launch.py --mode=sweep --sweep=configs/claims/asynchronous.py:small \
        --workdir=runs/asynchronous
    python launch.py --mode=report --workdir=runs/asynchronous

The network and heads of the authors' asynchronous experiments, six modules, the fourth one slowed
by S; M is the number of messages per replay ring. The first row is synchronous. The small size has
5 epochs, so that the sweep takes less than two hours.

Published as figures only: no loss up to about S = 1.2, a small one up to 2; M = 1 costs little.
"""

from typing import Any

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common

MODULES, SLOWED = 6, 3


def slowed(factor: float, size: int, rule: str = "least_used_latest") -> dict[str, Any]:
    """Returns the fields of asynchronous training with one slowed module.

    Args:
      factor: how much slower the module with index `SLOWED` is.
      size: messages per ring.
      rule: replay rule.
    """
    slowdown = tuple(factor if k == SLOWED else 1.0 for k in range(MODULES))
    return {
        "engine.name": "simulated",
        "engine.slowdown": slowdown,
        "replay.size": size,
        "replay.rule": rule,
        "checkpoint.replay_every": 0,  # rings are large: a resumed run fills them again
    }


ROWS: common.Variants = {
    "synchronous": {},
    **{
        f"S={factor:g},M={size}": slowed(factor, size)
        for factor, size in ((1.2, 1), (1.2, 10), (1.2, 50), (1.0, 50), (1.5, 50), (2.0, 50))
    },
    "S=2,M=50,released": slowed(2.0, 50, "released"),
}
CHOSEN: dict[str, float] = {
    "synchronous": 0.03,
    "S=1.2,M=1": 0.01,
    "S=1.2,M=10": 0.03,
    "S=1.2,M=50": 0.01,
    "S=1,M=50": 0.03,
    "S=1.5,M=50": 0.01,
    "S=2,M=50": 0.01,
    "S=2,M=50,released": 0.01,
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.paper_cifar10() if full else common.small_cifar10()
    config.model.name, config.model.modules, config.model.head = "cnn6_replay", MODULES, "mlp"
    config.model.width = 128 if full else 16
    if not full:
        config.train.epochs = 5.0
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    return common.sweep(base, ROWS, size, CHOSEN)
