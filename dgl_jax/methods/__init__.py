"""Training methods: the program of each turn, the schedule, and the messages between modules."""

from dgl_jax.methods import backprop, deep_supervision, dgl, dni, layerwise
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
    "deep_supervision",
    "dgl",
    "dni",
    "layerwise",
    "register_method",
]
