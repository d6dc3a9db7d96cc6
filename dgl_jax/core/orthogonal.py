"""Orthogonal initial weights (Saxe et al. 2014)."""

from typing import Any

import jax
from jaxtyping import Array, Key

from dgl_jax.core import rngs

PyTree = Any
BLOCK, OBJECTIVE, ADAPTER = range(3)  # parts of a module, which have random streams of their own


def orthogonal(params: PyTree, root: Key[Array, ""], part: int, number: int, gain: float) -> PyTree:
    """Replaces the weights of convolutions and linear layers by orthogonal matrices.

    A weight is an array named `kernel`; its last axis counts outputs, and the others together are
    the inputs. The columns of the matrix, or its rows if there are fewer, are orthonormal before
    they are multiplied by `gain`. Other parameters stay.

    Args:
      params: parameters of a block, an objective or an adapter.
      root: root key of the run, see `rngs.root`.
      part: BLOCK, OBJECTIVE or ADAPTER.
      number: index of the block, or of the block after the objective or the adapter.
      gain: factor of the matrices.
    """
    initializer = jax.nn.initializers.orthogonal(gain)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    return jax.tree.unflatten(
        structure,
        [
            initializer(rngs.orthogonal(root, part, number, index), leaf.shape, leaf.dtype)
            if getattr(path[-1], "key", "") == "kernel" and leaf.ndim > 1
            else leaf
            for index, (path, leaf) in enumerate(leaves)
        ],
    )
