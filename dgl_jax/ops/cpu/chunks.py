"""Works on a batch in chunks of a few images, whose temporary arrays stay in a core's cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def chunk_size(batch: int, least: int) -> int:
    """Returns the smallest number of images, `least` or more, that divides the batch; or the whole batch."""
    return next((n for n in range(max(1, least), batch) if batch % n == 0), batch)


def chunk(x: Shaped[Array, "B ..."], size: int, i: Array | int) -> Shaped[Array, "size ..."]:
    """Returns the images of chunk `i`.

    They come from all over the batch, so that a batch that is split among devices gives chunks that are split alike.
    """
    return lax.dynamic_index_in_dim(x.reshape(size, -1, *x.shape[1:]), i, 1, keepdims=False)


def sum_chunks(function: Callable[..., Array], size: int, *arrays: Shaped[Array, "B ..."]) -> Array:
    """Sums the results of a function over all chunks.

    Args:
      function: takes a chunk of each array. XLA's convolutions are slow in it (100 times).
      size: images of a chunk, from `chunk_size`.
      arrays: the batch.
    """
    if size == len(arrays[0]):
        return function(*arrays)

    def one(i: Array, total: Array) -> Array:
        # Not a chunk of an array grouped once, in front of the loop: XLA would fuse that with what made the array, which could
        # then not take the place of its inputs (benchmarks/memory).
        return total + function(*(chunk(x, size, i) for x in arrays))

    like = jax.eval_shape(lambda *arrays: function(*(chunk(x, size, 0) for x in arrays)), *arrays)
    return lax.fori_loop(0, len(arrays[0]) // size, one, jnp.zeros(like.shape, like.dtype))


def map_chunks(
    function: Callable[[Array], Array], size: int, x: Shaped[Array, "B ..."]
) -> Shaped[Array, "B ..."]:
    """Applies a function to all chunks and puts its results together in the order of the batch.

    Args:
      function: takes a chunk and returns a result for each of its images.
      size: images of a chunk, from `chunk_size`.
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
