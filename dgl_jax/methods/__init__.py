"""Training methods: the program of each turn, the schedule, and the messages between modules."""

from dgl_jax.methods import (
    backprop,
    ddg,
    deep_supervision,
    dgl,
    dni,
    fdg,
    features_replay,
)
from dgl_jax.methods.base import Method, MethodKind, Program, TrainStep, composed
from dgl_jax.registry import METHODS

register_method = METHODS.register

__all__ = [
    "METHODS",
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
    "register_method",
]
