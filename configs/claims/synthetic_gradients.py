r"""Claim: DGL is better than synthetic gradients, and about as good as back-propagation.

    python launch.py --mode=sweep --sweep=configs/claims/synthetic_gradients.py:small \
        --workdir=runs/synthetic
    python launch.py --mode=report --workdir=runs/synthetic

The three-layer network of the comparison, cut between its layers, so that the last one has the true
gradient (in the published runs it had not); the heads of DGL have the layers of a synthesizer. At
full size all rows and synthesizers use the learning rate of the published runs, 3e-5.

Published (width 128, Adam 3e-5, batch 256, 1,500 epochs, one seed): back-propagation 84.4 %, DGL
85.1 %, `cdni` 81.8 %, `dni` 62.3 %; after 200 epochs 79.8, 80.9, 75.4 and 52.7 %.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common

ROWS: common.Variants = {
    "dgl": {"model.head": "conv5x5"},
    **{name: {"method.name": name} for name in ("backprop", "cdni", "dni")},
}
SYNTHESIZED = ("cdni", "dni")
CHOSEN: dict[str, float] = {"dgl": 0.001, "backprop": 0.003, "cdni": 0.001, "dni": 0.0003}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.small_cifar10()
    config.model.name, config.model.modules = "cnn3", 3
    config.model.width = 128 if full else 16
    config.optimizer.name, config.optimizer.weight_decay = "adam", 0.0
    config.schedule.name = "constant"
    if full:
        config.data.train_examples, config.data.batch_size = 0, 256
        config.train.epochs = 200.0
        config.checkpoint.every = 0
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    chosen = dict.fromkeys(ROWS, 3e-5) if size == "full" else CHOSEN
    for name, config in common.sweep(
        base, ROWS, size, chosen, rates=(3e-4, 1e-3, 3e-3), default=1e-3
    ):
        if size == "full" and config.method.name in SYNTHESIZED:
            config.method.synthesizer_learning_rate = 3e-5
        yield name, config
