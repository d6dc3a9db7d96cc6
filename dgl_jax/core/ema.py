"""Moving average of a module's parameters and batch statistics, for evaluation and export.

The average is part of the module's state (`extras["ema"]`): it is checkpointed with the module and
does not influence training.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax.core.module import ModuleState

PyTree = Any
_NAME = "ema"


def begin(state: ModuleState) -> ModuleState:
    """Adds a moving average to a fresh state; it starts at the initial values."""
    values = {"params": state.params, "batch_stats": state.batch_stats}
    return dataclasses.replace(state, extras=state.extras | {_NAME: jax.tree.map(jnp.copy, values)})


def advance(state: ModuleState, decay: float) -> ModuleState:
    """Updates the average with the values after an update.

    After n updates, the values after update i have a weight proportional to decay^(n - i). This is
    the exponential moving average with the bias correction of Adam (Kingma and Ba 2015, section 3),
    so short runs need no smaller decay.

    Args:
      state: the module's state after the update, made by `begin`.
      decay: at least 0 and below 1.

    Returns:
      The state with the new average.
    """
    new = {"params": state.params, "batch_stats": state.batch_stats}
    # (1 - decay) / (1 - decay^n); expm1 avoids the cancellation for a decay near 1.
    share = (1.0 - decay) / -jnp.expm1(state.updates * jnp.log(jnp.float32(decay)))
    average = jax.tree.map(lambda old, x: old + share * (x - old), state.extras[_NAME], new)
    return dataclasses.replace(state, extras=state.extras | {_NAME: average})


def evaluated(state: ModuleState) -> tuple[PyTree, PyTree]:
    """Returns (params, batch_stats) to evaluate with: the average if there is one."""
    average = state.extras.get(_NAME)
    if average:
        return average["params"], average["batch_stats"]
    return state.params, state.batch_stats
