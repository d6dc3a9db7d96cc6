"""Orthogonal initial weights (Saxe et al. 2014)."""

import math
from typing import Any

import jax
from jaxtyping import Array, Key

from dgl_jax.core import rngs

PyTree = Any
_SPLIT = ("query", "key", "value")  # layers of attention whose outputs have the axes [heads, dims]
BLOCK, OBJECTIVE, ADAPTER = range(3)  # parts of a module, which have random streams of their own


def orthogonal(params: PyTree, root: Key[Array, ""], part: int, number: int, gain: float) -> PyTree:
    """Replaces the weights of convolutions and linear layers by orthogonal matrices.

    A weight is an array named `kernel`; its last axis counts outputs, and the others together are
    the inputs. In the layers of attention named `query`, `key` and `value` the first axis alone
    counts inputs. The columns of the matrix, or its rows if there are fewer, are orthonormal before
    they are multiplied by `gain`. Other parameters stay.

    Args:
      params: parameters of a block, an objective or an adapter.
      root: root key of the run, see `rngs.root`.
      part: BLOCK, OBJECTIVE or ADAPTER.
      number: index of the block, or of the block after the objective or the adapter.
      gain: factor of the matrices.
    """
    initializer = jax.nn.initializers.orthogonal(gain)

    def drawn(path: Any, index: int, leaf: Array) -> Array:
        names, shape = [getattr(part, "key", "") for part in path], leaf.shape
        if names[-1] != "kernel" or leaf.ndim < 2:
            return leaf
        if names[-2:-1] and names[-2] in _SPLIT:
            shape = (shape[0], math.prod(shape[1:]))
        key = rngs.orthogonal(root, part, number, index)
        return initializer(key, shape, leaf.dtype).reshape(leaf.shape)

    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    return jax.tree.unflatten(
        structure,
        [drawn(path, index, leaf) for index, (path, leaf) in enumerate(leaves)],
    )
