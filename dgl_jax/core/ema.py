"""A moving average of a module's parameters and batch statistics: what evaluation, prediction and export use where it is kept.

It lives in the module's state as `extras["ema"]`, is checkpointed with it, and does not touch training.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax.core.module import ModuleState

PyTree = Any
_NAME = "ema"


def begin(state: ModuleState) -> ModuleState:
    """A fresh state that keeps an average; it holds the initial values until the first update."""
    kept = {"params": state.params, "batch_stats": state.batch_stats}
    return dataclasses.replace(state, extras=state.extras | {_NAME: jax.tree.map(jnp.copy, kept)})


def advance(state: ModuleState, decay: float) -> ModuleState:
    """Takes in the values after an update: those after update i of n weigh in proportion to decay^(n - i).

    That is the exponential moving average freed of its initial value, as in Adam (Kingma and Ba 2015, section 3): short runs need
    no smaller decay.

    Args:
      decay: at least 0 and below 1.
    """
    new = {"params": state.params, "batch_stats": state.batch_stats}
    # (1 - decay) / (1 - decay^n), without the cancellation
    share = (1.0 - decay) / -jnp.expm1(state.updates * jnp.log(jnp.float32(decay)))
    average = jax.tree.map(lambda old, x: old + share * (x - old), state.extras[_NAME], new)
    return dataclasses.replace(state, extras=state.extras | {_NAME: average})


def evaluated(state: ModuleState) -> tuple[PyTree, PyTree]:
    """(params, batch_stats) to evaluate with: the average where one is kept, else the module's own."""
    kept = state.extras.get(_NAME)
    return (kept["params"], kept["batch_stats"]) if kept else (state.params, state.batch_stats)
