"""Training rules: what one turn of a module computes, and what travels between modules."""

from dgl_jax.methods import backprop, dgl
from dgl_jax.methods.base import Method, MethodKind
from dgl_jax.registry import METHODS

register_method = METHODS.register

__all__ = ["METHODS", "Method", "MethodKind", "backprop", "dgl", "register_method"]
