"""Order and recomputation inside a jitted function, which keep its temporary memory small.

XLA picks the order of operations that do not depend on each other, and computes equal things once. `lax.optimization_barrier`, on
which `jax.checkpoint` relies, forbids both on GPU and TPU, but XLA's CPU compiler drops it before it merges: the step of six
convolution blocks took 10.1 MB with and without `jax.checkpoint` around each, and 10.1 MB with a barrier between the halves of the
batch. With a data dependency, as here, it took 6.9 and 5.1 MB.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dgl_jax.ops.choice import only_xla

PyTree = Any


def after(tree: PyTree, first: PyTree) -> PyTree:
    """Returns the values of `tree` so that whatever uses them is computed after `first`.

    Args:
      tree: float arrays; small ones such as parameters, for on the CPU each is added to.
      first: float arrays. If one is not finite, the CPU's result is not a number.
    """
    return lax.platform_dependent(tree, first, cpu=_plus_nothing, default=_barrier)


def recomputed(
    function: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]], *, ops: str = "auto"
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Makes the backward pass of a function compute it again, so that only its arguments are kept for it.

    Args:
      function: called as `function(params, x, others) -> (y, aux)`. Gradients flow from `y` to `params` and `x`.
      ops: `auto` saves memory on every platform; `xla` is `jax.checkpoint`, which saves none on a CPU but has all derivatives.
        See `dgl_jax.ops`.

    Returns:
      The function to call in its place.
    """
    if only_xla(ops):
        return jax.checkpoint(function)

    def forward(
        params: PyTree, x: PyTree, others: PyTree
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]:
        return function(params, x, others), (params, x, others)

    def backward(
        kept: tuple[PyTree, PyTree, PyTree], cotangents: tuple[PyTree, PyTree]
    ) -> tuple[PyTree, PyTree, None]:
        params, x, others = kept
        y_cotangent, _ = cotangents
        _, pull, _ = jax.vjp(
            lambda p, x: function(p, x, others), after(params, y_cotangent), x, has_aux=True
        )
        return *pull(y_cotangent), None

    again = jax.custom_vjp(function)
    again.defvjp(forward, backward)
    return again


def _plus_nothing(tree: PyTree, first: PyTree) -> PyTree:
    nothing: Any = sum(
        0.0 * leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(first)
    )
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(nothing, leaf.dtype), tree)


def _barrier(tree: PyTree, first: PyTree) -> PyTree:
    return lax.optimization_barrier((tree, first))[0]
