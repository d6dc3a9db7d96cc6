"""Order and recomputation inside a jitted function: what keeps its temporary memory small.

XLA picks the order of what does not depend on each other, and computes equal things once. `lax.optimization_barrier`, on which
`jax.checkpoint` relies, forbids both on GPU and TPU, but XLA's CPU compiler drops it before it merges: the step of six convolution
blocks took 10.1 MB with and without `jax.checkpoint` around each, and 10.1 MB with a barrier between the halves of the batch. With
a dependency of data, as here, it took 6.9 and 5.1 MB.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def after(tree: PyTree, first: PyTree) -> PyTree:
    """The values of `tree`, for what is to be computed after `first`.

    Args:
      tree: float arrays; small ones such as parameters, for on the CPU each is added to.
      first: float arrays. Where one is not finite, the CPU's result is not a number.
    """
    return lax.platform_dependent(tree, first, cpu=_plus_nothing, default=_barrier)


def recomputed(function: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
    """`function(params, x, others) -> (y, aux)` whose backward pass computes it again and keeps its arguments only.

    Gradients go from `y` to `params` and `x`. What `jax.checkpoint` is for, but for the CPU's compiler as well.
    """

    def forward(params: PyTree, x: PyTree, others: PyTree) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]:
        return function(params, x, others), (params, x, others)

    def backward(kept: tuple[PyTree, PyTree, PyTree], cotangents: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree, None]:
        params, x, others = kept
        of_y, _ = cotangents
        _, pull, _ = jax.vjp(lambda p, x: function(p, x, others), after(params, of_y), x, has_aux=True)
        return *pull(of_y), None

    again = jax.custom_vjp(function)
    again.defvjp(forward, backward)
    return again


def _plus_nothing(tree: PyTree, first: PyTree) -> PyTree:
    nothing: Any = sum(0.0 * leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(first))
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(nothing, leaf.dtype), tree)


def _barrier(tree: PyTree, first: PyTree) -> PyTree:
    return lax.optimization_barrier((tree, first))[0]
