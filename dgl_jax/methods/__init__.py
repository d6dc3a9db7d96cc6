"""Training methods: the program of each turn, the schedule, and the messages between modules."""

from dgl_jax.config.registry import METHODS
from dgl_jax.methods import (
    backprop,
    ddg,
    deep_supervision,
    dgl,
    dni,
    fdg,
    features_replay,
    layerwise,
)
from dgl_jax.methods.base import Method, MethodKind, Program, TrainStep
from dgl_jax.methods.post import Composed, composed

register_method = METHODS.register

__all__ = [
    "METHODS",
    "Composed",
    "Method",
    "MethodKind",
    "Program",
    "TrainStep",
    "backprop",
    "composed",
    "ddg",
    "deep_supervision",
    "dgl",
    "dni",
    "fdg",
    "features_replay",
    "layerwise",
    "register_method",
]
