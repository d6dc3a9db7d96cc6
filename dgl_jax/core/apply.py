"""Calls of Flax modules with explicit parameters and batch statistics."""

from typing import Any

import flax.linen as nn
import jax

from dgl_jax.ops import recomputed

PyTree = Any


def apply_layer(
    layer: nn.Module,
    params: PyTree,
    stats: PyTree,
    arguments: tuple[Any, ...],
    train: bool,
    key: jax.Array | None,
    collect: bool = False,
) -> tuple[Any, PyTree, PyTree]:
    """Applies a Flax module.

    Args:
      layer: Flax module called as `layer(*arguments, train)`.
      params: its parameters.
      stats: its batch_stats.
      arguments: positional arguments of the call.
      train: normalize with the statistics of the batch and update the running averages.
      key: key for dropout; None if nothing in the layer is random.
      collect: also return the values that the layer sows into "intermediates".

    Returns:
      The result; the new batch_stats (unchanged if not `train`); and the sown values ({} unless
      `collect`).
    """
    variables = {"params": params, "batch_stats": stats}
    mutable = ["batch_stats"] * train + ["intermediates"] * collect
    keys = {"dropout": key} if train and key is not None else None
    if not mutable:
        return layer.apply(variables, *arguments, train=False), stats, {}
    result, updated = layer.apply(variables, *arguments, train=train, mutable=mutable, rngs=keys)
    new_stats = updated.get("batch_stats", {}) if train else stats
    return result, new_stats, updated.get("intermediates", {})


def apply_recomputed(
    ops: str,
    layer: nn.Module,
    params: PyTree,
    stats: PyTree,
    arguments: tuple[Any, ...],
    train: bool,
    key: jax.Array | None,
    collect: bool,
) -> tuple[Any, PyTree, PyTree]:
    """Calls `apply_layer` so that the backward pass computes intermediate values again."""

    def function(params: PyTree, arguments: Any, others: Any) -> tuple[Any, PyTree]:
        stats, key = others
        result, new_stats, sown = apply_layer(layer, params, stats, arguments, train, key, collect)
        return (result, sown), new_stats  # gradients flow from the first part only

    (result, sown), new_stats = recomputed(function, ops=ops)(params, arguments, (stats, key))
    return result, new_stats, sown
