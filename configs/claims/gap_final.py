r"""Claim: the best local loss halves the gap to back-propagation, with one module per layer.

    python launch.py --mode=sweep --sweep=configs/claims/gap_final.py:small --workdir=runs/gap_final
    python launch.py --mode=report --workdir=runs/gap_final

The best local loss of the claim `gap` beside plain DGL, deep supervision and back-propagation, at
the learning rates chosen there: on all images, with twice as many channels, on the six-layer
network and on a residual one (ResNet-20 of half the width at the small size, ResNet-32 at the full
size).

The small size takes about 20 core-hours, an hour for the slowest run. All rows of a seed come
before the next seed.

Published by others: at K = 16, ResNet-32 loses 7 to 9 points with plain
DGL and 3 to 7 with better objectives.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common
from dgl_jax.configs.claims import gap

LOSSES = {"dgl": "dgl,K=6", "best": gap.BEST, "deep_supervision": "deep_supervision,K=6"}


def rate(network: str, source: str, modules: int) -> float:
    """Returns the rate that `gap` chose for a loss and number of modules, or else for six."""
    own = f"{source.removesuffix(',K=6')},K={modules}"
    return gap.CHOSEN[own if network == "cnn6" and own in gap.CHOSEN else source]


CUTS = {"cnn6": (6, 3, 2), "resnet": (8, 4)}  # `get_sweep` replaces resnet by a network
ROWS: common.Variants = {}
CHOSEN: dict[str, float] = {}
for network, counts in CUTS.items():
    for row, source, modules in [
        ("backprop", "backprop", 1),
        *(
            (f"{label},K={count}", source, count)
            for count in counts
            for label, source in LOSSES.items()
        ),
    ]:
        name = f"{network}/{row}"
        ROWS[name] = gap.ROWS[source] | {"model.name": network, "model.modules": modules}
        CHOSEN[name] = rate(network, source, modules)
# The transport cost needs residuals, which the six-layer network does not have.
for weight in (0.01, 0.1):
    ROWS[f"resnet/dgl,transport={weight:g},K=8"] = ROWS["resnet/dgl,K=8"] | {
        "objective.transport": weight
    }
# Measured on this network: with one and eight modules, the rates of the other one lose 18, 7 and 5
# points.
CHOSEN |= {name: 0.1 for name in ROWS if name.startswith("resnet/")}
# Rows of the picture of accuracy against the number of modules.
LINES = {
    "back-propagation": dict.fromkeys((2, 3, 6), "cnn6/backprop"),
    "auxiliary networks, context input": {k: f"cnn6/best,K={k}" for k in (2, 3, 6)},
    "plain DGL": {k: f"cnn6/dgl,K={k}" for k in (2, 3, 6)},
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.paper_cifar10() if full else common.small_cifar10()
    if not full:
        config.data.train_examples = 0
        config.train.epochs = 4.0
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    full = size == "full"
    rows = list(common.sweep(base, ROWS, size, CHOSEN))
    for name, config in sorted(rows, key=lambda row: row[1].seed):
        if config.model.name == "resnet":
            config.model.name, config.model.width = ("resnet32", 16) if full else ("resnet20", 8)
        else:
            config.model.width = 128 if full else 32
        yield name, config
