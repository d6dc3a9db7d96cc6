"""Decoupled Greedy Learning in JAX: the pure pieces, for other people's code.

A training run from settings is `dgl_jax.train.train_and_evaluate`. Importing this package touches no device, flag or logger.
"""

__version__ = "0.1.0"  # read by pyproject.toml too: a literal

from dgl_jax.codecs import vq
from dgl_jax.errors import UserError
from dgl_jax.losses import accuracy, cross_entropy
from dgl_jax.models import cuts, make_head, make_network, register
from dgl_jax.module import LocalModule, ModuleState, init_states, make_modules
from dgl_jax.packet import Batch, Packet, Targets
from dgl_jax.step import apply_gradient, eval_step, local_step

__all__ = [
    "Batch",
    "LocalModule",
    "ModuleState",
    "Packet",
    "Targets",
    "UserError",
    "accuracy",
    "apply_gradient",
    "cross_entropy",
    "cuts",
    "eval_step",
    "init_states",
    "local_step",
    "make_head",
    "make_modules",
    "make_network",
    "register",
    "vq",
]
