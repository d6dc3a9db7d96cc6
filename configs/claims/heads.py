r"""Claim: small heads of 1x1 convolutions and linear layers are enough.

    python launch.py --mode=sweep --sweep=configs/claims/heads.py:small \
        --workdir=runs/heads
    python launch.py --mode=report --workdir=runs/heads

The six-layer network, one module per layer, with each head of the paper's study.

Published (width 128, 50 epochs; not verified against the paper): `cnn` 92.2 %, `mlp` 90.6 %,
`mlp_sr` 91.2 %.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common

ROWS: common.Variants = {
    "backprop": {"method.name": "backprop", "model.modules": 1},
    **{head: {"model.head": head} for head in ("cnn", "mlp", "mlp_sr", "linear")},
}
CHOSEN: dict[str, float] = {
    "backprop": 0.03,
    "cnn": 0.03,
    "mlp": 0.03,
    "mlp_sr": 0.03,
    "linear": 0.1,
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.paper_cifar10() if full else common.small_cifar10()
    config.model.name, config.model.modules = "cnn6", 6
    config.model.width = 128 if full else 16
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    return common.sweep(base, ROWS, size, CHOSEN)
