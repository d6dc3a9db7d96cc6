r"""Claim: better local losses close most of the gap to back-propagation.

    python launch.py --mode=sweep --sweep=configs/claims/gap.py:rates --workdir=runs/modules
    python launch.py --mode=report --workdir=runs/modules

`rates` and `small` compare all local losses on the six-layer network with one module per layer, at
the size of the claim `modules`, whose rows `backprop`, `dgl` and `deep_supervision,K=6` they share;
the best one also with two and three modules. `gap_final` trains the best one on all images and more
networks.

Published by others: at K = 16, ResNet-32 loses 7 to 9 points with plain
DGL and 3 to 7 with the objectives here.
"""

from typing import Any

from ml_collections import ConfigDict

from dgl_jax.configs.claims import _common as common


def loss(name: str, **options: Any) -> dict[str, Any]:
    """Returns the fields of a local loss and its options."""
    return {f"objective.{field}": value for field, value in {"name": name, **options}.items()}


def auglocal(depth: int, **options: Any) -> dict[str, Any]:
    """Returns the fields of `auglocal` with the linear head of the paper."""
    return {"model.head": "linear", **loss("auglocal", depth=depth, **options)}


INFO_PRO = {"reconstruction_weights": (5.0, 0.0), "task_weights": (0.0, 2.0)}
ROWS: common.Variants = {
    "backprop": {"method.name": "backprop", "model.modules": 1},
    "deep_supervision,K=6": {"method.name": "deep_supervision"},
    **{f"dgl,K={count}": {"model.modules": count} for count in (2, 3, 6)},
    "auglocal,d=2": auglocal(2),
    **{
        f"auglocal,d=2,context_input,K={count}": auglocal(2, context_input=True)
        | {"model.modules": count}
        for count in (2, 3)
    },
    **{f"auglocal,d=2,K={count}": auglocal(2) | {"model.modules": count} for count in (2, 3)},
    "pred_sim,w=0.5": loss("pred_sim", similarity_weight=0.5),
    "info_pro": loss("info_pro", **INFO_PRO),
    "auglocal,d=1": auglocal(1),
    "dgl,context_input": {"objective.context_input": True},
    "auglocal,d=1,momentum": auglocal(1, momentum_block=True),
    "dgl,smoothing": {"train.label_smoothing": 0.1},
    "pred_sim,w=0.99": loss("pred_sim"),
    "dgl,orthogonal": {"model.init": "orthogonal"},
    "auglocal,d=3,pyramid": auglocal(3, pyramid=True),
    "auglocal,d=2,context_input": auglocal(2, context_input=True),
    "auglocal,d=1,context_input": auglocal(1, context_input=True),
    "pred_sim,w=0.5,context_input": loss("pred_sim", similarity_weight=0.5, context_input=True),
    "info_pro,context_input": loss("info_pro", context_input=True, **INFO_PRO),
    "info_pro,contrast": loss("info_pro", form="contrast", **INFO_PRO),
}
CHOSEN: dict[str, float] = {
    "backprop": 0.01,
    "deep_supervision,K=6": 0.03,
    "dgl,K=2": 0.01,
    "dgl,K=3": 0.01,
    "dgl,K=6": 0.03,
    "auglocal,d=2": 0.03,
    "auglocal,d=2,context_input,K=2": 0.03,
    "auglocal,d=2,context_input,K=3": 0.03,
    "auglocal,d=2,K=2": 0.03,
    "auglocal,d=2,K=3": 0.03,
    "pred_sim,w=0.5": 0.03,
    "info_pro": 0.03,
    "auglocal,d=1": 0.1,
    "dgl,context_input": 0.03,
    "auglocal,d=1,momentum": 0.1,
    "dgl,smoothing": 0.03,
    "pred_sim,w=0.99": 0.03,
    "dgl,orthogonal": 0.03,
    "auglocal,d=3,pyramid": 0.03,
    "auglocal,d=2,context_input": 0.1,
    "auglocal,d=1,context_input": 0.03,
    "pred_sim,w=0.5,context_input": 0.1,
    "info_pro,context_input": 0.03,
    "info_pro,contrast": 0.03,
}
BEST = "auglocal,d=2,context_input"  # on validation
# Rows of the picture of accuracy against the number of modules.
LINES = {
    "back-propagation": dict.fromkeys((2, 3, 6), "backprop"),
    "auxiliary networks, context input": {2: f"{BEST},K=2", 3: f"{BEST},K=3", 6: BEST},
    "auxiliary networks": {2: "auglocal,d=2,K=2", 3: "auglocal,d=2,K=3", 6: "auglocal,d=2"},
    "plain DGL": {2: "dgl,K=2", 3: "dgl,K=3", 6: "dgl,K=6"},
}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = common.paper_cifar10() if full else common.small_cifar10()
    config.model.name, config.model.width = "cnn6", 128 if full else 16
    config.model.modules = 6
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    # The rate in the middle first, so that all losses can be compared early.
    yield from sorted(
        common.sweep(base, ROWS, size, CHOSEN),
        key=lambda row: not row[0].startswith(f"{BEST}/") and "/lr=0.03/" not in row[0],
    )
