r"""Claim: synchronous DGL reaches the accuracy of the sequential solver in fewer passes.

    python launch.py --mode=sweep --sweep=configs/claims/sequential.py:small \
        --workdir=runs/sequential
    python launch.py --mode=report --workdir=runs/sequential

The four-layer network of the paper's learning curves, one module per layer. `layerwise` trains one
module after the other, each for as many epochs as DGL trains all of them. With four laps it passes
over the modules four times, for a quarter of the epochs each.

Published (width 64, 50 epochs per layer, one seed), test accuracy of layers 1 to 4: DGL 78.4, 85.3,
87.9, 89.9 %; sequential 78.6, 85.8, 88.3, 89.1 %.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common

ROWS: common.Variants = {
    "dgl": {},
    "layerwise": {"method.name": "layerwise"},
    "layerwise_4_laps": {"method.name": "layerwise", "method.laps": 4},
    "backprop": {"method.name": "backprop"},
}
CHOSEN: dict[str, float] = {
    "dgl": 0.1,
    "layerwise": 0.1,
    "layerwise_4_laps": 0.03,
    "backprop": 0.03,
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.paper_cifar10() if full else common.small_cifar10()
    config.model.name, config.model.modules = "cnn4", 4
    config.model.width = 64 if full else 16
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    return common.sweep(base, ROWS, size, CHOSEN)
