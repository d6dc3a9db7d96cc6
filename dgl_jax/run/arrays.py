"""Checks of the arrays that go into a checkpoint: finite values and checksums."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.engines import EngineState


def all_finite(state: EngineState) -> list[bool]:
    """Checks that the parameters and batch statistics of the modules are finite.

    Blocks until the arrays are computed. They are checked on the host, where a checkpoint needs
    them anyway, so that nothing has to be compiled.

    Returns:
      One entry per module, True if all its values are finite.
    """
    # One transfer per module; one per array would wait for each.
    values = (jax.device_get((module.params, module.batch_stats)) for module in state.modules)
    return [all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)) for tree in values]


def checksum(tree: Any) -> int:
    """Returns the CRC-32 of the bytes of all arrays in a pytree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = zlib.crc32(
            np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data, value
        )
    return value
