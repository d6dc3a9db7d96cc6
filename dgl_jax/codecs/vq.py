"""Online vector quantisation: activations as codes of a codebook that is learnt while training goes on.

C channels are cut into G = C / D groups. At every position each group's D values are replaced by the number of the nearest of N
entries, so an image's hop takes `log2(N) / D` bits a value. The codebook is an online k-means of what passes by: an exponential
moving average as in VQ-VAE (van den Oord et al. 2017, appendix A.1), or mini-batch k-means (Sculley 2010).

The functions are pure, can be jitted, and take any float array [..., C]:

    book = vq.init(key, x, codes=256, dims=8)              # from a first batch
    codes = vq.encode(book.entries, x)                     # uint8 [..., G]
    x = vq.decode(book.entries, codes)                     # float32 [..., C]
    book, health = vq.update(book, key, x)                 # learns from another batch; memory stays the same
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped, UInt

from dgl_jax.codecs.base import check_dims
from dgl_jax.core import rngs
from dgl_jax.errors import UserError

MAX_CODES = 65_536
_SEEDED = 1024  # above so many codes k-means++ takes too long: the start is a sample then
_POOL = 4  # vectors a code from which the start and the restarts are drawn
_UNROLL = 8  # codes that the running minimum looks at in one pass over the vectors
_CACHED = 2**16  # values of one pass, all channels: they stay in a core's cache, as do their distances
_ROUNDING = 2.0**-20  # of a vector's length: one that is no further from its entry has it already
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


def init(key: Array, x: Float[Array, "..."], codes: int = 256, dims: int = 8, start: str = "kmeans++") -> Codebook:
    """A codebook from data: N vectors of `x`, spread out by k-means++ (Arthur and Vassilvitskii 2007) or simply sampled.

    Args:
      x: [..., C]; non-finite vectors are never chosen. Where there are fewer finite ones than entries they repeat; a group without
        one has zeros, which the restarts of `update` replace.
      codes: N, from 1 to 65,536.
      dims: D, must divide C.
      start: kmeans++ or sample; above 1,024 codes always the latter.

    Raises:
      UserError: N or D does not fit.
    """
    groups_of(codes, dims, x.shape[-1])
    rows = rows_of(x)
    pool, finite = _pool(rngs.pool(key), rows, codes, dims)
    spread = start == "kmeans++" and codes <= _SEEDED
    entries = (_spread if spread else _sampled)(key, pool, finite, codes)
    # Of many broken vectors the pool may hold nothing else.
    entries = jnp.where(finite.any(-1)[:, None, None], entries, _first_finite(rows, dims)[:, None])
    number = _nearest(pool, entries)
    seen, moved = _sums(jnp.where(finite[:, None], pool - _entries_of(entries, number), 0.0), finite, number, codes)
    all_of = jnp.maximum(seen.sum(-1, keepdims=True), 1.0)
    counts = seen / all_of
    return Codebook(entries, counts, counts[..., None] * entries + moved / all_of[..., None], seen)


def encode(entries: Float[Array, "*S G N D"], x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Finds the nearest entry of each group of each vector: its number, of equally near ones the lowest.

    A distance is the sum of the squared differences in float32, in order of the dimensions and on every backend, with a relative
    error of at most (D + 2) 2^-24 whatever the mean and the spread of the data. So two entries whose squared distances differ by
    more than twice that are told apart alike everywhere, and the chosen one is never further than that from the nearest; between
    two that are closer compilers may decide differently, since some fuse a product and a sum into one rounding. Differences below
    1e-19 and above 1e19 have no square in float32.

    Args:
      entries: of one stage, [G, N, D]; or of several (`residual.py`), each for what the ones before left over.
      x: [..., C].

    Returns:
      uint8 [..., S * G] for N <= 256, uint16 above; for N <= 16, 2 to 8 codes are packed into each byte of the last axis.
    """
    entries = _staged(entries)
    stages, groups, codes, _ = entries.shape
    found = _codes(rows_of(x), entries)
    return _pack(found.reshape(*x.shape[:-1], stages * groups), codes)


def decode(entries: Float[Array, "*S G N D"], codes: UInt[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """The entries of those numbers, summed over the stages, [..., C]."""
    entries = _staged(entries)
    stages, groups, count, dims = entries.shape
    numbers = jnp.split(_unpack(codes, count, stages * groups), stages, axis=-1)
    flat = entries.reshape(stages, groups * count, dims)
    parts = [jnp.take(e, n + count * jnp.arange(groups, dtype=jnp.int32), axis=0, mode="clip") for e, n in zip(flat, numbers)]
    return functools.reduce(jnp.add, parts).reshape(*codes.shape[:-1], groups * dims).astype(dtype)


def update(
    book: Codebook,
    key: Array,
    x: Float[Array, "..."],
    rule: str = "ema",
    decay: float = 0.9,
    smoothing: float = 1e-5,
    restart: float = 0.01,
    samples: int = 8,
) -> tuple[Codebook, dict[str, Float[Array, ""]]]:
    """Moves the entries towards the vectors they are nearest to.

    All sums are of differences between vectors and entries: an entry that is all its vectors' value stays, to the bit. Of a batch
    cut over devices they go over all of them.

    Args:
      x: [..., C]; non-finite vectors are left out.
      rule: ema: entries follow a moving average of the data; minibatch: an entry moves by 1 / (vectors it has seen), and settles.
      decay: of the moving averages.
      smoothing: weight of an entry's old value (in units of the mean count), so that one which is hardly used moves slowly.
      restart: an entry used less than this share of the mean is dead, and becomes a vector of `x` drawn with a probability in
        proportion to its squared error; 0: never. It begins with the mean count, which the others give up in proportion. Vectors
        that have their entry already, to rounding, are not drawn, and of entries that drew equal vectors one is restarted.
      samples: vectors a code that are drawn from `x`, 0: all.

    Returns:
      The new codebook, and `perplexity` (codes in use, exp of the entropy of the counts, mean over groups), `dead` (share of
      codes), both before restarts, and `skipped` (non-finite vectors).
    """
    groups, codes, dims = book.entries.shape
    rows = rows_of(x)
    skipped = (~jnp.isfinite(rows).reshape(*rows.shape[:-1], groups, dims).all(-1)).sum(dtype=jnp.float32)
    count, moved = _accumulate(draw(rngs.sample(key), rows, samples * codes), book.entries)
    number = count.sum(-1, keepdims=True)
    share, moved_mean = count / jnp.maximum(number, 1.0), moved / jnp.maximum(number, 1.0)[..., None]
    known = book.counts.sum(-1, keepdims=True) > 0
    # Nothing finite: nothing learnt. Nothing known yet: the average is that of this batch.
    weight = jnp.where(number > 0, jnp.where(known, 1.0 - decay, 1.0), 0.0)
    counts = book.counts + weight * (share - book.counts)
    if rule == "ema":
        # How far the sums are from what the entries make of the counts; but for the start and the smoothing not at all.
        ahead = book.sums - book.counts[..., None] * book.entries
        ahead = jnp.where(jnp.abs(ahead) > _ROUNDING * jnp.abs(book.sums), ahead, 0.0)
        ahead = (1.0 - weight[..., None]) * ahead + weight[..., None] * moved_mean
        step = ahead / jnp.maximum(counts + smoothing / codes, 1e-30)[..., None]
        entries = jnp.where(number[..., None] > 0, book.entries + step, book.entries)
        sums = jnp.where(number[..., None] > 0, counts[..., None] * book.entries + ahead, book.sums)
        new = Codebook(entries, counts, sums, book.seen)
    else:  # an entry is the mean of all that it has seen
        seen = book.seen + count
        entries = book.entries + moved / jnp.maximum(seen, 1.0)[..., None]
        new = Codebook(entries, counts, book.sums, seen)
    dead = counts < (restart or 0.01) / codes
    entropy = -(counts * jnp.log(jnp.maximum(counts, 1e-30))).sum(-1)
    health = {"perplexity": jnp.exp(entropy).mean(), "dead": dead.mean(dtype=jnp.float32), "skipped": skipped}
    return (_restarted(new, key, rows, dead) if restart else new), health


def groups_of(codes: int, dims: int, channels: int) -> int:
    """G; raises UserError where N or D does not fit."""
    if not 1 <= codes <= MAX_CODES:
        raise UserError(f"config.codec.codes={codes}: a codebook has from 1 to {MAX_CODES} entries")
    return check_dims(dims, channels)


# Vectors


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


def _pool(key: Array, rows: Float[Array, "B P C"], codes: int, dims: int) -> tuple[Float[Array, "G D n"], Array]:
    """Some of the vectors (non-finite ones as zeros), and which of them are finite."""
    pool = _vectors(draw(key, rows, _POOL * codes), dims)
    finite = jnp.isfinite(pool).all(1)
    return jnp.where(finite[:, None], pool, 0.0), finite


def _square(vectors: Float[Array, "G D n"], entry: Float[Array, "G D"]) -> Float[Array, "G n"]:
    """Squared distances, summed in order of the dimensions."""
    return functools.reduce(jnp.add, (jnp.square(vectors[:, d] - entry[:, d, None]) for d in range(vectors.shape[1])))


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


def _first_finite(rows: Float[Array, "B P C"], dims: int) -> Float[Array, "G D"]:
    """Returns the first finite vector of each group; zeros where there is none."""
    vectors = rows.reshape(-1, rows.shape[-1] // dims, dims)
    finite = jnp.isfinite(vectors).all(-1)
    place = jax.lax.argmax(finite, 0, jnp.int32)
    found = jnp.take_along_axis(vectors, place[None, :, None], axis=0)[0]
    return jnp.where(finite.any(0)[:, None], found, 0.0)


def _sampled(key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int) -> Float[Array, "G N D"]:
    return _at(pool, _pick(rngs.first(key), finite.astype(jnp.float32), codes))


def _spread(key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int) -> Float[Array, "G N D"]:
    """Draws each next vector with a probability in proportion to its squared distance from those that are chosen.

    Once all vectors are chosen they are drawn again, equally likely.
    """
    first = _at(pool, _pick(rngs.first(key), finite.astype(jnp.float32), 1))

    def add(n: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        entries, distance = found
        distance = jnp.minimum(distance, _square(pool, entries[:, n - 1]))
        left = finite & (distance > 0)
        weights = jnp.where(left.any(-1, keepdims=True), jnp.where(left, distance, 0.0), finite.astype(jnp.float32))
        entry = _at(pool, _pick(rngs.entry(key, n), weights, 1))
        return jax.lax.dynamic_update_slice_in_dim(entries, entry, n, 1), distance

    entries = jnp.zeros((len(pool), codes, pool.shape[1]), jnp.float32).at[:, :1].set(first)
    return jax.lax.fori_loop(1, codes, add, (entries, jnp.full(finite.shape, jnp.inf, jnp.float32)))[0]


def _restarted(book: Codebook, key: Array, rows: Float[Array, "B P C"], dead: Array) -> Codebook:
    """Begins dead entries anew, where that helps a vector."""
    _, codes, dims = book.entries.shape
    pool, finite = _pool(rngs.restart_pool(key), rows, codes, dims)
    error = jnp.square(pool - _entries_of(book.entries, _nearest(pool, book.entries))).sum(1)
    error = jnp.where(finite & (error > _ROUNDING**2 * jnp.square(pool).sum(1)), error, 0.0)
    fresh = _at(pool, _pick(rngs.restart(key), error, codes))
    dead &= error.max(-1, keepdims=True) > 0
    entries = jnp.where(dead[..., None], fresh, book.entries)
    # Of equal vectors the lowest entry is the nearest, and the only one that would be used.
    dead &= _nearest(entries.transpose(0, 2, 1), entries) == jnp.arange(codes, dtype=jnp.int32)
    kept = jnp.where(dead, 0.0, book.counts).sum(-1, keepdims=True)
    left = 1.0 - dead.mean(-1, keepdims=True, dtype=jnp.float32)
    factor = jnp.where(dead.any(-1, keepdims=True), left / jnp.maximum(kept, 1e-30), 1.0)
    return Codebook(
        jnp.where(dead[..., None], fresh, book.entries),
        jnp.where(dead, 1.0 / codes, factor * book.counts),
        jnp.where(dead[..., None], fresh / codes, factor[..., None] * book.sums),
        jnp.where(dead, 0.0, book.seen),
    )


# The nearest entry


def _staged(entries: Float[Array, "*S G N D"]) -> Float[Array, "S G N D"]:
    return entries.reshape(-1, *entries.shape[-3:])


def _codes(rows: Float[Array, "B P C"], entries: Float[Array, "S G N D"]) -> Int[Array, "B P SG"]:
    """In chunks of positions, so that neither the distances of all vectors nor what a stage leaves over exist at once."""
    (*_, codes, dims), (_, positions, _) = entries.shape, rows.shape
    in_cache = _positions_in_cache(rows)
    in_memory = max(1, min(positions, positions * dims // codes))  # as many bytes as the vectors themselves
    return jax.lax.platform_dependent(
        rows,
        entries,
        cpu=lambda rows, entries: _chunked(rows, entries, in_cache, _running_minimum),
        default=lambda rows, entries: _chunked(rows, entries, in_memory, _all_distances),
    )


def _positions_in_cache(rows: Float[Array, "B P C"]) -> int:
    examples, positions, channels = rows.shape
    return max(1, min(positions, -(-_CACHED // (examples * channels))))


def _nearest(vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]) -> Int[Array, "G n"]:
    """Of a set of vectors that is small already."""
    return jax.lax.platform_dependent(vectors, entries, cpu=_running_minimum, default=_all_distances)


def _chunked(rows: Array, entries: Float[Array, "S G N D"], length: int, nearest: Callable[[Array, Array], Array]) -> Array:
    (stages, groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape

    def chunk(i: Array, found: Array) -> Array:
        start = jnp.minimum(i * length, positions - length)  # the last one overlaps the one before, which changes nothing
        vectors, numbers = _vectors(jax.lax.dynamic_slice_in_dim(rows, start, length, 1), dims), []
        for stage in range(stages):
            numbers.append(nearest(vectors, entries[stage]))
            if stage + 1 < stages:
                vectors = vectors - _entries_of(entries[stage], numbers[-1])
        number = jnp.concatenate(numbers).T.reshape(examples, length, stages * groups)
        return jax.lax.dynamic_update_slice_in_dim(found, number.astype(found.dtype), start, 1)

    found = jnp.zeros((examples, positions, stages * groups), jnp.uint8 if codes <= 256 else jnp.uint16)
    return jax.lax.fori_loop(0, -(-positions // length), chunk, found)


def _running_minimum(vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]) -> Int[Array, "G n"]:
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


def _all_distances(vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]) -> Int[Array, "G n"]:
    """For an accelerator: all distances, which the compiler fuses with the search for the least.

    The usual |v|^2 - 2 v e + |e|^2, a matrix product, cancels: at a mean of 100 and a deviation of 0.1 it takes the wrong entry for
    every third vector. Over the few values of a group it has no advantage either.
    """
    distances = jax.vmap(_square, in_axes=(None, 1), out_axes=1)(vectors, entries)
    return jax.lax.argmin(distances, 1, jnp.int32)


# Counting


def _entries_of(entries: Float[Array, "G N D"], number: Int[Array, "G n"]) -> Float[Array, "G D n"]:
    return jnp.take_along_axis(entries.transpose(0, 2, 1), number[:, None], axis=2)


def _sums(values: Float[Array, "G D n"], finite: Array, number: Int[Array, "G n"], codes: int) -> tuple[Array, Array]:
    """Returns how many vectors each entry has, and the sum of some values of them."""
    groups, dims, _ = values.shape
    place = (number + codes * jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    rows = values.transpose(0, 2, 1).reshape(-1, dims)
    count = jnp.zeros(groups * codes, jnp.float32).at[place].add(finite.reshape(-1).astype(jnp.float32))
    total = jnp.zeros((groups * codes, dims), jnp.float32).at[place].add(rows)
    return count.reshape(groups, codes), total.reshape(groups, codes, dims)


def _accumulate(rows: Float[Array, "B P C"], entries: Float[Array, "G N D"]) -> tuple[Array, Array]:
    """Returns counts, and sums of vector less entry, over all vectors that are finite; in chunks."""
    (groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape
    length = _positions_in_cache(rows)

    def chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * length, positions - length)
        part = jax.lax.dynamic_slice_in_dim(rows, start, length, 1)
        fresh = jnp.tile(start + jnp.arange(length) >= i * length, examples)  # the last chunk overlaps the one before
        vectors = _vectors(part, dims)
        counted = jnp.isfinite(vectors).all(1) & fresh
        vectors = jnp.where(counted[:, None], vectors, 0.0)
        number = _nearest(vectors, entries)
        moved = jnp.where(counted[:, None], vectors - _entries_of(entries, number), 0.0)
        count, total = _sums(moved, counted, number, codes)
        return found[0] + count, found[1] + total

    empty = (jnp.zeros((groups, codes), jnp.float32), jnp.zeros((groups, codes, dims), jnp.float32))
    return jax.lax.fori_loop(0, -(-positions // length), chunk, empty)


# Codes of less than a byte


def bits_of(codes: int) -> int:
    """Bits of a code: 1, 2, 4, 8 or 16."""
    return next(bits for bits in (1, 2, 4, 8, 16) if codes <= 2**bits)


def _pack(numbers: UInt[Array, "... G"], codes: int) -> UInt[Array, "..."]:
    if (bits := bits_of(codes)) >= 8:
        return numbers
    each = 8 // bits
    padded = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % each)])
    parts = padded.reshape(*numbers.shape[:-1], -1, each) << (bits * jnp.arange(each, dtype=jnp.uint8))
    return parts.sum(-1, dtype=jnp.uint8)


def _unpack(packed: UInt[Array, "..."], codes: int, groups: int) -> Int[Array, "... G"]:
    if (bits := bits_of(codes)) >= 8:
        return packed.astype(jnp.int32)
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    parts = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)[..., :groups].astype(jnp.int32)
