"""Loops over a batch in chunks of a few images, whose temporary arrays stay in a core's cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def chunk_size(batch: int, least: int) -> int:
    """Returns the smallest divisor of `batch` that is >= `least`, or `batch` if there is none."""
    return next((n for n in range(max(1, least), batch) if batch % n == 0), batch)


def chunk(x: Shaped[Array, "B ..."], size: int, i: Array | int) -> Shaped[Array, "size ..."]:
    """Returns the images of chunk `i`.

    The images are spread evenly over the batch, so that a chunk of a batch that is split among
    devices is split the same way.
    """
    return lax.dynamic_index_in_dim(x.reshape(size, -1, *x.shape[1:]), i, 1, keepdims=False)


def sum_chunks(function: Callable[..., Array], size: int, *arrays: Shaped[Array, "B ..."]) -> Array:
    """Sums `function(*chunk)` over all chunks of a batch, in a loop.

    Args:
      function: takes a chunk of each array. It must not call `lax.conv_general_dilated`, which is
        about 100 times slower inside a loop on XLA:CPU.
      size: images per chunk, from `chunk_size`.
      arrays: arrays of the batch, [B, ...].
    """
    if size == len(arrays[0]):
        return function(*arrays)

    def one(i: Array, total: Array) -> Array:
        # Slice inside the loop: reshaping beforehand lets XLA fuse the reshape into the producer of
        # the array and prevents in-place reuse of the producer's buffer (benchmarks/memory).
        return total + function(*(chunk(x, size, i) for x in arrays))

    like = jax.eval_shape(lambda *arrays: function(*(chunk(x, size, 0) for x in arrays)), *arrays)
    return lax.fori_loop(0, len(arrays[0]) // size, one, jnp.zeros(like.shape, like.dtype))


def map_chunks(
    function: Callable[[Array], Array], size: int, x: Shaped[Array, "B ..."]
) -> Shaped[Array, "B ..."]:
    """Applies a function to all chunks and returns its results in the order of the batch.

    Args:
      function: takes a chunk and returns an array with a row per image.
      size: images per chunk, from `chunk_size`.
      x: the batch.
    """
    if size == len(x):
        return function(x)

    def one(i: Array, results: Array) -> Array:
        return lax.dynamic_update_index_in_dim(results, function(chunk(x, size, i)), i, 1)

    like = jax.eval_shape(lambda x: function(chunk(x, size, 0)), x)
    results = lax.fori_loop(
        0, len(x) // size, one, jnp.zeros((size, len(x) // size, *like.shape[1:]), like.dtype)
    )
    return results.reshape(-1, *like.shape[1:])
