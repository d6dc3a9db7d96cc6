r"""Claim: accuracy falls as modules multiply, and isolation is the reason, not the heads.

    python launch.py --mode=sweep --sweep=configs/claims/modules.py:small \
        --workdir=runs/modules
    python launch.py --mode=report --workdir=runs/modules

The six-layer network in K modules. `deep_supervision` has the same heads and losses as DGL, but
gradients flow through all modules: it separates the effect of heads from that of isolation.

Published by others (ResNet-32, batch 1,024): errors of DGL 8.69, 11.48, 14.17 and 16.21 % at K = 2,
4, 8 and 16, back-propagation 7.37 %.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common

ROWS: common.Variants = {
    "backprop": {"method.name": "backprop", "model.modules": 1},
    **{
        f"{method},K={count}": {"method.name": method, "model.modules": count}
        for count in (2, 3, 6)
        for method in ("dgl", "deep_supervision")
    },
}
CHOSEN: dict[str, float] = {
    "backprop": 0.01,
    "dgl,K=2": 0.01,
    "deep_supervision,K=2": 0.03,
    "dgl,K=3": 0.01,
    "deep_supervision,K=3": 0.03,
    "dgl,K=6": 0.03,
    "deep_supervision,K=6": 0.03,
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.paper_cifar10() if full else common.small_cifar10()
    config.model.name, config.model.width = "cnn6", 128 if full else 16
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    return common.sweep(base, ROWS, size, CHOSEN)
