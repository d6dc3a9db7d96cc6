"""Online k-means on groups of channels: where it starts, the nearest entry, sums over batches, and restarts of dead entries."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from dgl_jax.core import rngs

SEEDED = 1024  # above so many codes k-means++ takes too long: the start is a sample then


_POOL = 4  # vectors a code from which the start and the restarts are drawn


_UNROLL = 8  # codes that the running minimum looks at in one pass over the vectors


_CACHED = (
    2**16
)  # values of one pass, all channels: they stay in a core's cache, as do their distances


ROUNDING = 2.0**-20  # of a vector's length: one that is no further from its entry has it already


_LARGE = 1e30  # of a weight: so many that sums of them stay finite


@struct.dataclass
class Codebook:
    """What online k-means knows; every field has a row a channel group.

    Attributes:
      entries: the N vectors of each group.
      counts: moving average of the share of vectors that each entry was nearest to; sums to 1 (to 0 before a vector was seen).
      sums: moving average of their sum over their number; mini-batch k-means has no use for it.
      seen: how many vectors each entry was nearest to, for mini-batch k-means.
    """

    entries: Float[Array, "G N D"]
    counts: Float[Array, "G N"]
    sums: Float[Array, "G N D"]
    seen: Float[Array, "G N"]


def rows_of(x: Shaped[Array, "..."]) -> Float[Array, "B P C"]:
    """Examples, positions, channels: loops go over positions, since examples may be cut over devices."""
    x = x.astype(jnp.float32)
    return x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def _vectors(rows: Float[Array, "B P C"], dims: int) -> Float[Array, "G D n"]:
    return rows.reshape(-1, rows.shape[-1] // dims, dims).transpose(1, 2, 0)


def draw(key: Array, rows: Float[Array, "B P C"], wanted: int) -> Float[Array, "B p C"]:
    """About so many vectors (0: all), at random positions that all examples share."""
    examples, positions, _ = rows.shape
    count = -(-wanted // examples)
    if not wanted or count >= positions:
        return rows
    return jnp.take(rows, jax.random.randint(key, (count,), 0, positions, jnp.int32), axis=1)


def pool_of(
    key: Array, rows: Float[Array, "B P C"], codes: int, dims: int
) -> tuple[Float[Array, "G D n"], Array]:
    """Some of the vectors (non-finite ones as zeros), and which of them are finite."""
    pool = _vectors(draw(key, rows, _POOL * codes), dims)
    finite = jnp.isfinite(pool).all(1)
    return jnp.where(finite[:, None], pool, 0.0), finite


def _square(vectors: Float[Array, "G D n"], entry: Float[Array, "G D"]) -> Float[Array, "G n"]:
    """Squared distances, summed in order of the dimensions."""
    return functools.reduce(
        jnp.add, (jnp.square(vectors[:, d] - entry[:, d, None]) for d in range(vectors.shape[1]))
    )


def _pick(key: Array, weights: Float[Array, "G n"], wanted: int) -> Int[Array, "G wanted"]:
    """Draws positions with probabilities in proportion to the weights, never one of weight 0; all 0: position 0."""
    weights = jnp.minimum(weights, _LARGE)
    cumulated = jnp.cumsum(weights, axis=-1)
    points = jax.random.uniform(key, (len(weights), wanted), jnp.float32) * cumulated[:, -1:]
    found = jax.vmap(lambda c, p: jnp.searchsorted(c, p, side="right"))(cumulated, points)
    # Rounding may lead to a neighbour: back to the last one before it that has a weight, or on to the first.
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(weights > 0, places, -1), axis=1)
    found = jnp.take_along_axis(last, jnp.minimum(found, len(places) - 1), axis=1)
    return jnp.where(found < 0, jax.lax.argmax(weights > 0, 1, jnp.int32)[:, None], found)


def _at(pool: Float[Array, "G D n"], places: Int[Array, "G N"]) -> Float[Array, "G N D"]:
    return jnp.take_along_axis(pool, places[:, None], axis=2).transpose(0, 2, 1)


def first_finite(rows: Float[Array, "B P C"], dims: int) -> Float[Array, "G D"]:
    """Returns the first finite vector of each group; zeros where there is none."""
    vectors = rows.reshape(-1, rows.shape[-1] // dims, dims)
    finite = jnp.isfinite(vectors).all(-1)
    place = jax.lax.argmax(finite, 0, jnp.int32)
    found = jnp.take_along_axis(vectors, place[None, :, None], axis=0)[0]
    return jnp.where(finite.any(0)[:, None], found, 0.0)


def sampled_start(
    key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int
) -> Float[Array, "G N D"]:
    return _at(pool, _pick(rngs.first(key), finite.astype(jnp.float32), codes))


def spread_start(
    key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int
) -> Float[Array, "G N D"]:
    """Draws each next vector with a probability in proportion to its squared distance from those that are chosen.

    Once all vectors are chosen they are drawn again, equally likely.
    """
    first = _at(pool, _pick(rngs.first(key), finite.astype(jnp.float32), 1))

    def add(n: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        entries, distance = found
        distance = jnp.minimum(distance, _square(pool, entries[:, n - 1]))
        left = finite & (distance > 0)
        weights = jnp.where(
            left.any(-1, keepdims=True), jnp.where(left, distance, 0.0), finite.astype(jnp.float32)
        )
        entry = _at(pool, _pick(rngs.entry(key, n), weights, 1))
        return jax.lax.dynamic_update_slice_in_dim(entries, entry, n, 1), distance

    entries = jnp.zeros((len(pool), codes, pool.shape[1]), jnp.float32).at[:, :1].set(first)
    return jax.lax.fori_loop(
        1, codes, add, (entries, jnp.full(finite.shape, jnp.inf, jnp.float32))
    )[0]


def restart_dead(book: Codebook, key: Array, rows: Float[Array, "B P C"], dead: Array) -> Codebook:
    """Begins dead entries anew, where that helps a vector."""
    _, codes, dims = book.entries.shape
    pool, finite = pool_of(rngs.restart_pool(key), rows, codes, dims)
    error = jnp.square(pool - entries_of(book.entries, nearest_entry(pool, book.entries))).sum(1)
    error = jnp.where(finite & (error > ROUNDING**2 * jnp.square(pool).sum(1)), error, 0.0)
    fresh = _at(pool, _pick(rngs.restart(key), error, codes))
    dead &= error.max(-1, keepdims=True) > 0
    entries = jnp.where(dead[..., None], fresh, book.entries)
    # Of equal vectors the lowest entry is the nearest, and the only one that would be used.
    dead &= nearest_entry(entries.transpose(0, 2, 1), entries) == jnp.arange(codes, dtype=jnp.int32)
    kept = jnp.where(dead, 0.0, book.counts).sum(-1, keepdims=True)
    left = 1.0 - dead.mean(-1, keepdims=True, dtype=jnp.float32)
    factor = jnp.where(dead.any(-1, keepdims=True), left / jnp.maximum(kept, 1e-30), 1.0)
    return Codebook(
        jnp.where(dead[..., None], fresh, book.entries),
        jnp.where(dead, 1.0 / codes, factor * book.counts),
        jnp.where(dead[..., None], fresh / codes, factor[..., None] * book.sums),
        jnp.where(dead, 0.0, book.seen),
    )


def with_stages(entries: Float[Array, "*S G N D"]) -> Float[Array, "S G N D"]:
    return entries.reshape(-1, *entries.shape[-3:])


def nearest_codes(
    rows: Float[Array, "B P C"], entries: Float[Array, "S G N D"]
) -> Int[Array, "B P SG"]:
    """In chunks of positions, so that neither the distances of all vectors nor what a stage leaves over exist at once."""
    (*_, codes, dims), (_, positions, _) = entries.shape, rows.shape
    in_cache = _positions_in_cache(rows)
    in_memory = max(
        1, min(positions, positions * dims // codes)
    )  # as many bytes as the vectors themselves
    return jax.lax.platform_dependent(
        rows,
        entries,
        cpu=lambda rows, entries: _chunked(rows, entries, in_cache, _running_minimum),
        default=lambda rows, entries: _chunked(rows, entries, in_memory, _all_distances),
    )


def _positions_in_cache(rows: Float[Array, "B P C"]) -> int:
    examples, positions, channels = rows.shape
    return max(1, min(positions, -(-_CACHED // (examples * channels))))


def nearest_entry(
    vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]
) -> Int[Array, "G n"]:
    """Of a set of vectors that is small already."""
    return jax.lax.platform_dependent(
        vectors, entries, cpu=_running_minimum, default=_all_distances
    )


def _chunked(
    rows: Array,
    entries: Float[Array, "S G N D"],
    length: int,
    nearest: Callable[[Array, Array], Array],
) -> Array:
    (stages, groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape

    def chunk(i: Array, found: Array) -> Array:
        start = jnp.minimum(
            i * length, positions - length
        )  # the last one overlaps the one before, which changes nothing
        vectors, numbers = _vectors(jax.lax.dynamic_slice_in_dim(rows, start, length, 1), dims), []
        for stage in range(stages):
            numbers.append(nearest(vectors, entries[stage]))
            if stage + 1 < stages:
                vectors = vectors - entries_of(entries[stage], numbers[-1])
        number = jnp.concatenate(numbers).T.reshape(examples, length, stages * groups)
        return jax.lax.dynamic_update_slice_in_dim(found, number.astype(found.dtype), start, 1)

    found = jnp.zeros(
        (examples, positions, stages * groups), jnp.uint8 if codes <= 256 else jnp.uint16
    )
    return jax.lax.fori_loop(0, -(-positions // length), chunk, found)


def _running_minimum(
    vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]
) -> Int[Array, "G n"]:
    """For a CPU: one loop over the entries that keeps the best, fused, in cache; a third of the time of the bare matrix product."""
    codes = entries.shape[1]

    def look(n: Any, best: tuple[Array, Array]) -> tuple[Array, Array]:
        distance, number = best
        found = _square(vectors, jax.lax.dynamic_index_in_dim(entries, n, 1, keepdims=False))
        closer = found < distance
        return jnp.where(closer, found, distance), jnp.where(closer, jnp.int32(n), number)

    def several(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        for j in range(_UNROLL):
            best = look(i * _UNROLL + j, best)
        return best

    shape = (vectors.shape[0], vectors.shape[2])
    best = (jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
    best = jax.lax.fori_loop(0, codes // _UNROLL, several, best)
    for n in range(codes - codes % _UNROLL, codes):
        best = look(n, best)
    return best[1]


def _all_distances(
    vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]
) -> Int[Array, "G n"]:
    """For an accelerator: all distances, which the compiler fuses with the search for the least.

    The usual |v|^2 - 2 v e + |e|^2, a matrix product, cancels: at a mean of 100 and a deviation of 0.1 it takes the wrong entry for
    every third vector. Over the few values of a group it has no advantage either.
    """
    distances = jax.vmap(_square, in_axes=(None, 1), out_axes=1)(vectors, entries)
    return jax.lax.argmin(distances, 1, jnp.int32)


def entries_of(entries: Float[Array, "G N D"], number: Int[Array, "G n"]) -> Float[Array, "G D n"]:
    return jnp.take_along_axis(entries.transpose(0, 2, 1), number[:, None], axis=2)


def sums_of(
    values: Float[Array, "G D n"], finite: Array, number: Int[Array, "G n"], codes: int
) -> tuple[Array, Array]:
    """Returns how many vectors each entry has, and the sum of some values of them."""
    groups, dims, _ = values.shape
    place = (number + codes * jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    rows = values.transpose(0, 2, 1).reshape(-1, dims)
    count = (
        jnp.zeros(groups * codes, jnp.float32).at[place].add(finite.reshape(-1).astype(jnp.float32))
    )
    total = jnp.zeros((groups * codes, dims), jnp.float32).at[place].add(rows)
    return count.reshape(groups, codes), total.reshape(groups, codes, dims)


def accumulate(rows: Float[Array, "B P C"], entries: Float[Array, "G N D"]) -> tuple[Array, Array]:
    """Returns counts, and sums of vector less entry, over all vectors that are finite; in chunks."""
    (groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape
    length = _positions_in_cache(rows)

    def chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * length, positions - length)
        part = jax.lax.dynamic_slice_in_dim(rows, start, length, 1)
        fresh = jnp.tile(
            start + jnp.arange(length) >= i * length, examples
        )  # the last chunk overlaps the one before
        vectors = _vectors(part, dims)
        counted = jnp.isfinite(vectors).all(1) & fresh
        vectors = jnp.where(counted[:, None], vectors, 0.0)
        number = nearest_entry(vectors, entries)
        moved = jnp.where(counted[:, None], vectors - entries_of(entries, number), 0.0)
        count, total = sums_of(moved, counted, number, codes)
        return found[0] + count, found[1] + total

    empty = (jnp.zeros((groups, codes), jnp.float32), jnp.zeros((groups, codes, dims), jnp.float32))
    return jax.lax.fori_loop(0, -(-positions // length), chunk, empty)
