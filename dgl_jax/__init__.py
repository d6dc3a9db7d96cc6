"""Decoupled Greedy Learning in JAX: step functions, modules, objectives and codecs as a library.

`dgl_jax.train.train_and_evaluate` trains from a configuration. Importing this package touches no
device, flag or logger. JAX and Flax take a second to import, so they are imported when one of the
names below is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # pyproject.toml reads this line: keep it a literal

if TYPE_CHECKING:
    from dgl_jax.codecs import vq
    from dgl_jax.core.module import LocalModule, ModuleState, init_states, make_modules
    from dgl_jax.core.step import apply_gradient, eval_step, local_step
    from dgl_jax.errors import UserError
    from dgl_jax.models import cuts, make_head, make_network, register_network
    from dgl_jax.objectives import Classifier, Objective, accuracy, cross_entropy, means
    from dgl_jax.types import Batch, Context, Message

__all__ = [
    "Batch",
    "Classifier",
    "Context",
    "LocalModule",
    "Message",
    "ModuleState",
    "Objective",
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
    "means",
    "register_network",
    "vq",
]

_ROOMS = {
    "codecs": ("vq",),
    "core.module": ("LocalModule", "ModuleState", "init_states", "make_modules"),
    "core.step": ("apply_gradient", "eval_step", "local_step"),
    "errors": ("UserError",),
    "models": ("cuts", "make_head", "make_network", "register_network"),
    "objectives": ("Classifier", "Objective", "accuracy", "cross_entropy", "means"),
    "types": ("Batch", "Context", "Message"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(f"dgl_jax.{room}"), name)
            return globals()[name]
    raise AttributeError(f"module 'dgl_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
