"""Online k-means on groups of channels: initialization, nearest entries, sums, and restarts.

Axes in shapes: B examples, P positions, C channels, G channel groups of D channels each, N codebook
entries, n vectors, S stages.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dgl_jax.codecs.draws import draw
from dgl_jax.core import rngs

# Most codes for which k-means++ is fast enough; larger codebooks start from a plain sample.
SEEDED = 1024

_POOL = 4  # vectors per code in the pool that initial and restarted entries are drawn from
_UNROLL = 8  # codes compared in one pass of the running minimum over the vectors

# Values per chunk of a search on a CPU, and its channels. A chunk fits into a core's first cache,
# so that its transposition reads all values of a cache line before the line is evicted.
_CACHED = 2**13
_CHANNELS = 64

_SUMMED = 2**16  # values per chunk of `accumulate`, over all channels

# Distance, relative to a vector's length, below which the vector counts as equal to its entry.
ROUNDING = 2.0**-20

_LARGE = 1e30  # upper bound of a weight, so that sums of weights stay finite


@struct.dataclass
class Codebook:
    """State of online k-means, one row per channel group.

    Attributes:
      entries: [G, N, D] entries of each group's codebook.
      counts: [G, N] moving average of the share of vectors nearest to each entry. A group's counts
        sum to 1, or to 0 before its first vector.
      sums: [G, N, D] moving average of the sum of an entry's vectors, divided by the number of all
        vectors; mini-batch k-means does not use it.
      seen: [G, N] number of vectors that were nearest to each entry, for mini-batch k-means.
    """

    entries: Float[Array, "G N D"]
    counts: Float[Array, "G N"]
    sums: Float[Array, "G N D"]
    seen: Float[Array, "G N"]


def _vectors(rows: Float[Array, "B P C"], dims: int) -> Float[Array, "G D n"]:
    return rows.reshape(-1, rows.shape[-1] // dims, dims).transpose(1, 2, 0)


def pool_of(
    key: Array, rows: Float[Array, "B P C"], codes: int, dims: int, whole: bool = False
) -> tuple[Float[Array, "G D n"], Array]:
    """Samples a pool of vectors, and marks the finite ones; non-finite vectors become zeros.

    Returns:
      [G, D, n] pool, and [G, n] mask of finite vectors.
    """
    pool = _vectors(draw(key, rows, _POOL * codes, whole), dims)
    finite = jnp.isfinite(pool).all(1)
    return jnp.where(finite[:, None], pool, 0.0), finite


def _square(vectors: Float[Array, "G D n"], entry: Float[Array, "G D"]) -> Float[Array, "G n"]:
    """Returns squared distances, summed in the order of the dimensions."""
    return functools.reduce(
        jnp.add, (jnp.square(vectors[:, d] - entry[:, d, None]) for d in range(vectors.shape[1]))
    )


def _pick(key: Array, weights: Float[Array, "G n"], wanted: int) -> Int[Array, "G wanted"]:
    """Draws positions with probability proportional to their weights, never one of weight 0.

    Returns position 0 if all weights are 0.
    """
    weights = jnp.minimum(weights, _LARGE)
    cumulated = jnp.cumsum(weights, axis=-1)
    points = jax.random.uniform(key, (len(weights), wanted), jnp.float32) * cumulated[:, -1:]
    picked = jax.vmap(lambda sums, row: jnp.searchsorted(sums, row, side="right"))(
        cumulated, points
    )
    # Rounding may select a neighbor of weight 0. Then move back to the last position that has a
    # weight, or forward to the first one.
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    last_weighted = jax.lax.cummax(jnp.where(weights > 0, places, -1), axis=1)
    picked = jnp.take_along_axis(last_weighted, jnp.minimum(picked, len(places) - 1), axis=1)
    return jnp.where(picked < 0, jax.lax.argmax(weights > 0, 1, jnp.int32)[:, None], picked)


def _at(pool: Float[Array, "G D n"], places: Int[Array, "G N"]) -> Float[Array, "G N D"]:
    return jnp.take_along_axis(pool, places[:, None], axis=2).transpose(0, 2, 1)


def first_finite(rows: Float[Array, "B P C"], dims: int) -> Float[Array, "G D"]:
    """Returns the first finite vector of each group, or zeros if there is none."""
    vectors = rows.reshape(-1, rows.shape[-1] // dims, dims)
    finite = jnp.isfinite(vectors).all(-1)
    place = jax.lax.argmax(finite, 0, jnp.int32)
    vector = jnp.take_along_axis(vectors, place[None, :, None], axis=0)[0]
    return jnp.where(finite.any(0)[:, None], vector, 0.0)


def sampled_start(
    key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int
) -> Float[Array, "G N D"]:
    """Returns initial entries drawn uniformly from the finite vectors of the pool."""
    return _at(pool, _pick(rngs.first(key), finite.astype(jnp.float32), codes))


def spread_start(
    key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int
) -> Float[Array, "G N D"]:
    """Returns initial entries chosen by k-means++.

    Each entry is drawn with probability proportional to its squared distance from the nearest entry
    chosen before. Once all distinct vectors are chosen, further ones are drawn uniformly.
    """
    first = _at(pool, _pick(rngs.first(key), finite.astype(jnp.float32), 1))

    def add(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        entries, distance = carry
        distance = jnp.minimum(distance, _square(pool, entries[:, n - 1]))
        candidates = finite & (distance > 0)
        weights = jnp.where(
            candidates.any(-1, keepdims=True),
            jnp.where(candidates, distance, 0.0),
            finite.astype(jnp.float32),
        )
        entry = _at(pool, _pick(rngs.entry(key, n), weights, 1))
        return jax.lax.dynamic_update_slice_in_dim(entries, entry, n, 1), distance

    entries = jnp.zeros((len(pool), codes, pool.shape[1]), jnp.float32).at[:, :1].set(first)
    return jax.lax.fori_loop(
        1, codes, add, (entries, jnp.full(finite.shape, jnp.inf, jnp.float32))
    )[0]


def restart_dead(
    book: Codebook, key: Array, rows: Float[Array, "B P C"], dead: Array, whole: bool = False
) -> Codebook:
    """Replaces dead entries by vectors with a large error.

    An entry stays dead if no vector would benefit from a new one.

    Args:
      book: codebook after an update.
      key: random key.
      rows: [B, P, C] vectors of the batch.
      dead: [G, N] mask of dead entries.
      whole: see `draw`.

    Returns:
      The codebook in which each new entry has the mean count 1 / N and the counts of the other
      entries are scaled down so that all counts still sum to 1.
    """
    _, codes, dims = book.entries.shape
    pool, finite = pool_of(rngs.restart_pool(key), rows, codes, dims, whole)
    error = jnp.square(pool - entries_of(book.entries, nearest_entry(pool, book.entries))).sum(1)
    error = jnp.where(finite & (error > ROUNDING**2 * jnp.square(pool).sum(1)), error, 0.0)
    fresh = _at(pool, _pick(rngs.restart(key), error, codes))
    dead &= error.max(-1, keepdims=True) > 0
    entries = jnp.where(dead[..., None], fresh, book.entries)
    # If several entries drew equal vectors, restart only the lowest: ties go to it, so the others
    # would stay unused.
    dead &= nearest_entry(entries.transpose(0, 2, 1), entries) == jnp.arange(codes, dtype=jnp.int32)
    remaining_counts = jnp.where(dead, 0.0, book.counts).sum(-1, keepdims=True)
    remaining_share = 1.0 - dead.mean(-1, keepdims=True, dtype=jnp.float32)
    factor = jnp.where(
        dead.any(-1, keepdims=True), remaining_share / jnp.maximum(remaining_counts, 1e-30), 1.0
    )
    return Codebook(
        jnp.where(dead[..., None], fresh, book.entries),
        jnp.where(dead, 1.0 / codes, factor * book.counts),
        jnp.where(dead[..., None], fresh / codes, factor[..., None] * book.sums),
        jnp.where(dead, 0.0, book.seen),
    )


def with_stages(entries: Float[Array, "*S G N D"]) -> Float[Array, "S G N D"]:
    """Returns entries with an axis of stages in front, which is added if missing."""
    return entries.reshape(-1, *entries.shape[-3:])


def nearest_codes(
    rows: Float[Array, "B P C"], entries: Float[Array, "S G N D"]
) -> Int[Array, "B P SG"]:
    """Returns the nearest entries of all vectors, stage by stage.

    Works in chunks of positions, and on a CPU also of channel groups, so that neither the distances
    of all vectors nor the residuals of a stage exist in memory at once.

    Args:
      rows: [B, P, C] vectors.
      entries: [S, G, N, D] entries of all stages.

    Returns:
      [B, P, S * G] entry numbers.
    """
    (_, groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape
    width = max(1, min(groups, _CHANNELS // dims))
    in_cache = _length(_CACHED, positions, examples * width * dims)
    # Distances of a chunk then take as many bytes as all the vectors.
    in_memory = max(1, min(positions, positions * dims // codes))
    return jax.lax.platform_dependent(
        rows,
        entries,
        cpu=lambda rows, entries: _chunked(rows, entries, in_cache, width, _running_minimum),
        default=lambda rows, entries: _chunked(rows, entries, in_memory, groups, _all_distances),
    )


def _length(values: int, positions: int, per_position: int) -> int:
    return max(1, min(positions, -(-values // per_position)))


def nearest_entry(
    vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]
) -> Int[Array, "G n"]:
    """Returns the nearest entry of each vector in one step, for small sets of vectors."""
    return jax.lax.platform_dependent(
        vectors, entries, cpu=_running_minimum, default=_all_distances
    )


def _chunked(
    rows: Array,
    entries: Float[Array, "S G N D"],
    length: int,
    width: int,
    nearest: Callable[[Array, Array], Array],
) -> Array:
    (stages, groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape
    parts = -(-groups // width)

    def chunk(i: Array, all_codes: Array) -> Array:
        # The last chunks overlap the ones before, which only computes the same codes twice.
        start = jnp.minimum(i // parts * length, positions - length)
        group = jnp.minimum(i % parts * width, groups - width)
        part = jax.lax.dynamic_slice(
            rows, (0, start, group * dims), (examples, length, width * dims)
        )
        vectors, numbers = _vectors(part, dims), []
        stage_entries = jax.lax.dynamic_slice_in_dim(entries, group, width, 1)
        for stage in range(stages):
            numbers.append(nearest(vectors, stage_entries[stage]))
            if stage + 1 < stages:
                vectors = vectors - entries_of(stage_entries[stage], numbers[-1])
        number = jnp.concatenate(numbers).T.reshape(examples, length, stages, width)
        return jax.lax.dynamic_update_slice(
            all_codes, number.astype(all_codes.dtype), (0, start, 0, group)
        )

    all_codes = jnp.zeros(
        (examples, positions, stages, groups), jnp.uint8 if codes <= 256 else jnp.uint16
    )
    all_codes = jax.lax.fori_loop(0, -(-positions // length) * parts, chunk, all_codes)
    return all_codes.reshape(examples, positions, stages * groups)


def _running_minimum(
    vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]
) -> Int[Array, "G n"]:
    """Finds nearest entries on a CPU, with one fused loop over entries that keeps the best so far.

    The values stay in cache. `benchmarks/vq_speed` compares the time with a matrix product's.
    """
    codes = entries.shape[1]
    # XLA inlines a loop of one pass, and would fuse the transposition of the vectors into it.
    unroll = max(1, min(_UNROLL, codes // 2))

    def several(i: Array, best: Array) -> Array:
        for j in range(unroll):
            # Beyond the end the last entry repeats, which is never closer than itself.
            n = jnp.minimum(i * unroll + j, codes - 1)
            entry = jax.lax.dynamic_index_in_dim(entries, n, 1, keepdims=False)
            distance = _square(vectors, entry)
            candidate = jax.lax.complex(distance, jnp.full_like(distance, n))
            best = jnp.where(distance < best.real, candidate, best)
        return best

    # The parts of a complex value are distance and number of the best entry. From two arrays XLA
    # makes two loops on a CPU, each of which computes all distances.
    shape = (vectors.shape[0], vectors.shape[2])
    best = jnp.full(shape, jnp.inf, jnp.complex64)
    best = jax.lax.fori_loop(0, -(-codes // unroll), several, best)
    return best.imag.astype(jnp.int32)


def _all_distances(
    vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]
) -> Int[Array, "G n"]:
    """Finds nearest entries on an accelerator, where XLA fuses all distances with the argmin.

    The usual expansion |v|^2 - 2 v e + |e|^2, with a matrix product, cancels: for data with mean
    100 and standard deviation 0.1 it picks the wrong entry for every third vector. With the few
    values of a group it is no faster either.
    """
    distances = jax.vmap(_square, in_axes=(None, 1), out_axes=1)(vectors, entries)
    return jax.lax.argmin(distances, 1, jnp.int32)


def entries_of(entries: Float[Array, "G N D"], number: Int[Array, "G n"]) -> Float[Array, "G D n"]:
    """Returns the entries with the given numbers, [G, D, n]."""
    return jnp.take_along_axis(entries.transpose(0, 2, 1), number[:, None], axis=2)


def sums_of(
    values: Float[Array, "G D n"], finite: Array, number: Int[Array, "G n"], codes: int
) -> tuple[Array, Array]:
    """Counts the vectors of each entry and sums their values.

    Args:
      values: [G, D, n] values to sum, zero for vectors that do not count.
      finite: [G, n] mask of the vectors that count.
      number: [G, n] entry of each vector.
      codes: number of entries N.

    Returns:
      [G, N] counts and [G, N, D] sums.
    """
    groups, dims, _ = values.shape
    place = (number + codes * jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    rows = values.transpose(0, 2, 1).reshape(-1, dims)
    count = (
        jnp.zeros(groups * codes, jnp.float32).at[place].add(finite.reshape(-1).astype(jnp.float32))
    )
    total = jnp.zeros((groups * codes, dims), jnp.float32).at[place].add(rows)
    return count.reshape(groups, codes), total.reshape(groups, codes, dims)


def accumulate(rows: Float[Array, "B P C"], entries: Float[Array, "G N D"]) -> tuple[Array, Array]:
    """Returns the count of each entry and the sum of (vector - entry) over its finite vectors.

    Works in chunks of positions to bound the temporary memory.
    """
    (groups, codes, dims), (examples, positions, channels) = entries.shape, rows.shape
    length = _length(_SUMMED, positions, examples * channels)

    def chunk(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * length, positions - length)
        part = jax.lax.dynamic_slice_in_dim(rows, start, length, 1)
        # The last chunk overlaps the one before; count each vector once.
        is_new = jnp.tile(start + jnp.arange(length) >= i * length, examples)
        vectors = _vectors(part, dims)
        counted = jnp.isfinite(vectors).all(1) & is_new
        vectors = jnp.where(counted[:, None], vectors, 0.0)
        number = nearest_entry(vectors, entries)
        moved = jnp.where(counted[:, None], vectors - entries_of(entries, number), 0.0)
        count, total = sums_of(moved, counted, number, codes)
        return totals[0] + count, totals[1] + total

    empty = (jnp.zeros((groups, codes), jnp.float32), jnp.zeros((groups, codes, dims), jnp.float32))
    return jax.lax.fori_loop(0, -(-positions // length), chunk, empty)
