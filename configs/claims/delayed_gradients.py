r"""Claim: with two modules DGL is as good as methods with delayed gradients, without their traffic.

    python launch.py --mode=sweep --sweep=configs/claims/delayed_gradients.py:small \
        --workdir=runs/delayed
    python launch.py --mode=report --workdir=runs/delayed

A residual network in two modules: ResNet-20 of half the width and 5 epochs at the small size,
ResNet-110 at the full size.

Published errors (ResNet-110, K = 2, 300 epochs): back-propagation 6.47 and 5.79 %, DGL 6.5 and
6.26 %, `ddg` 6.59 %, `features_replay` 5.76 %, `fdg` 5.79 % (5.73 % with shrinking).
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import cifar10_resnet
from dgl_jax.configs.claims import _common as common

ROWS: common.Variants = {
    **{
        name: {"method.name": name} for name in ("backprop", "dgl", "ddg", "features_replay", "fdg")
    },
    "fdg_shrink": {"method.name": "fdg", "method.shrink": 0.5},
}
CHOSEN: dict[str, float] = {
    "backprop": 0.1,
    "dgl": 0.1,
    "ddg": 0.1,
    "features_replay": 0.1,
    "fdg": 0.1,
    "fdg_shrink": 0.1,
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = cifar10_resnet() if full else common.small_cifar10()
    config.model.modules = 2
    config.model.name, config.model.width = ("resnet110", 16) if full else ("resnet20", 8)
    if full:
        config.model.split = "0,27"
        config.checkpoint.keep = 1
    else:
        config.train.epochs = 5.0  # ResNet-20 takes twice as long as the networks of other claims
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    return common.sweep(base, ROWS, size, CHOSEN)
