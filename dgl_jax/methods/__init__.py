"""Training rules: what one turn of a module computes, and what travels between modules."""

from dgl_jax.methods import backprop, dgl
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
    "dgl",
    "register_method",
]
