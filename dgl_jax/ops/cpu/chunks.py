"""Work on a batch in passes of a few images each, whose temporary arrays stay in a core's cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def images(batch: int, least: int) -> int:
    """Of one pass: the fewest, but so many at least, that divide the batch, or the whole batch."""
    return next((n for n in range(max(1, least), batch) if batch % n == 0), batch)


def part(x: Shaped[Array, "B ..."], size: int, i: Array | int) -> Shaped[Array, "size ..."]:
    """The images of pass `i`, from all over the batch: where that is split among devices, so is each pass of as many."""
    return lax.dynamic_index_in_dim(x.reshape(size, -1, *x.shape[1:]), i, 1, keepdims=False)


def total(function: Callable[..., Array], size: int, *arrays: Shaped[Array, "B ..."]) -> Array:
    """The sum of what `function` makes of the parts of these arrays. Convolutions of the library are slow in it (100 times)."""
    if size == len(arrays[0]):
        return function(*arrays)

    def one(i: Array, found: Array) -> Array:
        # Not a part of an array grouped once, in front of the loop: XLA would fuse that with what made the array, which could
        # then not take the place of what it was made from (benchmarks/memory).
        return found + function(*(part(x, size, i) for x in arrays))

    like = jax.eval_shape(lambda *arrays: function(*(part(x, size, 0) for x in arrays)), *arrays)
    return lax.fori_loop(0, len(arrays[0]) // size, one, jnp.zeros(like.shape, like.dtype))


def joined(function: Callable[[Array], Array], size: int, x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """What `function` makes of each part of `x`, an image for an image, in the order of the batch."""
    if size == len(x):
        return function(x)

    def one(i: Array, found: Array) -> Array:
        return lax.dynamic_update_index_in_dim(found, function(part(x, size, i)), i, 1)

    like = jax.eval_shape(lambda x: function(part(x, size, 0)), x)
    found = lax.fori_loop(0, len(x) // size, one, jnp.zeros((size, len(x) // size, *like.shape[1:]), like.dtype))
    return found.reshape(-1, *like.shape[1:])
