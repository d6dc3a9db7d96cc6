"""Moving average of a module's parameters and batch statistics, for evaluation and export.

The average is part of the module's state (`extras["ema"]`): it is checkpointed with the module and
does not influence training.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    # (1 - decay) / (1 - decay^n). Near 1, expm1 and a logarithm in float64 avoid the cancellation.
    log = np.float32(math.log(decay) if decay else -math.inf)
    share = (1.0 - decay) / -jnp.expm1(state.updates * log)
    average = jax.tree.map(lambda old, x: old + share * (x - old), state.extras[_NAME], new)
    return dataclasses.replace(state, extras=state.extras | {_NAME: average})


def evaluated(state: ModuleState) -> tuple[PyTree, PyTree]:
    """Returns (params, batch_stats) to evaluate with: the average if there is one."""
    average = state.extras.get(_NAME)
    if average:
        return average["params"], average["batch_stats"]
    return state.params, state.batch_stats
