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

from dgl_jax.codecs.groups import check_dims
from dgl_jax.errors import UserError

MAX_CODES = 65_536
_SEEDED = 1024  # above so many codes k-means++ takes too long: the start is a sample then
_POOL = 4  # vectors a code from which the start and the restarts are drawn
_UNROLL = 8  # codes that the running minimum looks at in one pass over the vectors
_CACHED = 2**16  # values of one pass, all channels: they stay in a core's cache, as do their distances


@struct.dataclass
class Codebook:
    """What online k-means knows; every field has a row a channel group.

    Attributes:
      entries: the N vectors of each group.
      counts: moving average of the share of vectors that each entry was nearest to; sums to 1.
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
      x: [..., C]; non-finite vectors are never chosen.
      codes: N, from 1 to 65,536.
      dims: D, must divide C.
      start: kmeans++ or sample; above 1,024 codes always the latter.

    Raises:
      UserError: N or D does not fit.
    """
    groups_of(codes, dims, x.shape[-1])
    pool, finite = _pool(key, rows_of(x), codes, dims)
    spread = start == "kmeans++" and codes <= _SEEDED
    entries = (_spread if spread else _sampled)(jax.random.fold_in(key, 1), pool, finite, codes)
    count, total = _sums(pool, finite, _nearest(pool, entries), codes)
    all_of = jnp.maximum(finite.sum(-1, dtype=jnp.float32), 1.0)[:, None]
    return Codebook(entries, count / all_of, total / all_of[..., None], count)


def encode(entries: Float[Array, "*S G N D"], x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Number of the nearest entry (squared distance in float32, ties to the lowest) of each group of each vector.

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
    parts = [jnp.take(e, n + count * jnp.arange(groups), axis=0, mode="clip") for e, n in zip(flat, numbers)]
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
    """Moves the entries towards the vectors they are nearest to. Of a batch cut over devices the sums go over all of them.

    Args:
      x: [..., C]; non-finite vectors are left out.
      rule: ema: entries follow a moving average of the data; minibatch: an entry moves by 1 / (vectors it has seen), and settles.
      decay: of the moving averages.
      smoothing: added to every count (in units of the mean count), so that none is 0.
      restart: an entry used less than this share of the mean is dead, and becomes a vector of `x` drawn with a probability in
        proportion to its squared error, its statistics begun anew; 0: never.
      samples: vectors a code that are drawn from `x`, 0: all.

    Returns:
      The new codebook, and `perplexity` (codes in use, exp of the entropy, mean over groups), `dead` (share of codes, before they
      are restarted) and `skipped` (non-finite vectors).
    """
    groups, codes, dims = book.entries.shape
    rows = rows_of(x)
    skipped = (~jnp.isfinite(rows).reshape(*rows.shape[:-1], groups, dims).all(-1)).sum(dtype=jnp.float32)
    count, total = _accumulate(draw(key, rows, samples * codes), book.entries)
    number = count.sum(-1, keepdims=True)
    share, mean = count / jnp.maximum(number, 1.0), total / jnp.maximum(number, 1.0)[..., None]
    weight = jnp.where(number > 0, 1.0 - decay, 0.0)  # nothing finite: nothing learnt
    counts = book.counts + weight * (share - book.counts)
    if rule == "ema":
        sums, seen = book.sums + weight[..., None] * (mean - book.sums), book.seen
        smoothed = (counts + smoothing / codes) / (1.0 + smoothing)
        entries = sums / jnp.maximum(smoothed, 1e-30)[..., None]
    else:
        # Each entry is the mean of all it has seen, moved by differences: sums would lose digits as they grow.
        seen = book.seen + count
        step = (total - count[..., None] * book.entries) / jnp.maximum(seen, 1.0)[..., None]
        entries, sums = book.entries + step, book.sums
    entries = jnp.where(number[..., None] > 0, entries, book.entries)
    new = Codebook(entries, counts, sums, seen)
    dead = counts < (restart or 0.01) / codes
    entropy = -(counts * jnp.log(jnp.maximum(counts, 1e-30))).sum(-1)
    health = {"perplexity": jnp.exp(entropy).mean(), "dead": dead.mean(dtype=jnp.float32), "skipped": skipped}
    return (_restarted(new, jax.random.fold_in(key, 2), rows, dead) if restart else new), health


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
    return jnp.take(rows, jax.random.randint(key, (count,), 0, positions), axis=1)


def _pool(key: Array, rows: Float[Array, "B P C"], codes: int, dims: int) -> tuple[Float[Array, "G D n"], Array]:
    """Some of the vectors (non-finite ones as zeros), and which of them are finite."""
    pool = _vectors(draw(key, rows, _POOL * codes), dims)
    finite = jnp.isfinite(pool).all(1)
    return jnp.where(finite[:, None], pool, 0.0), finite


def _square(vectors: Float[Array, "G D n"], entry: Float[Array, "G D"]) -> Float[Array, "G n"]:
    """Squared distances, summed in order of the dimensions."""
    return functools.reduce(jnp.add, (jnp.square(vectors[:, d] - entry[:, d, None]) for d in range(vectors.shape[1])))


def _pick(key: Array, weights: Float[Array, "G n"], wanted: int) -> Int[Array, "G wanted"]:
    """Positions drawn with probabilities in proportion to the weights."""
    cumulated = jnp.cumsum(weights, axis=-1)
    points = jax.random.uniform(key, (len(weights), wanted)) * cumulated[:, -1:]
    found = jax.vmap(lambda c, p: jnp.searchsorted(c, p, side="right"))(cumulated, points)
    return jnp.minimum(found, weights.shape[-1] - 1)


def _at(pool: Float[Array, "G D n"], places: Int[Array, "G N"]) -> Float[Array, "G N D"]:
    return jnp.take_along_axis(pool, places[:, None], axis=2).transpose(0, 2, 1)


def _sampled(key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int) -> Float[Array, "G N D"]:
    return _at(pool, _pick(key, finite.astype(jnp.float32), codes))


def _spread(key: Array, pool: Float[Array, "G D n"], finite: Array, codes: int) -> Float[Array, "G N D"]:
    """Each next vector with a probability in proportion to its squared distance from those that are chosen."""
    weights = finite.astype(jnp.float32)
    first = _at(pool, _pick(key, weights, 1))

    def add(n: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        entries, distance = found
        distance = jnp.minimum(distance, _square(pool, entries[:, n - 1]))
        entry = _at(pool, _pick(jax.random.fold_in(key, n), distance * weights, 1))
        return jax.lax.dynamic_update_slice_in_dim(entries, entry, n, 1), distance

    entries = jnp.zeros((len(pool), codes, pool.shape[1])).at[:, :1].set(first)
    return jax.lax.fori_loop(1, codes, add, (entries, jnp.full(weights.shape, jnp.inf)))[0]


def _restarted(book: Codebook, key: Array, rows: Float[Array, "B P C"], dead: Array) -> Codebook:
    _, codes, dims = book.entries.shape
    pool, finite = _pool(key, rows, codes, dims)
    nearest = jnp.take_along_axis(book.entries, _nearest(pool, book.entries)[..., None], axis=1)
    error = jnp.square(pool.transpose(0, 2, 1) - nearest).sum(-1) * finite
    fresh = _at(pool, _pick(jax.random.fold_in(key, 1), error, codes))
    dead &= error.sum(-1, keepdims=True) > 0  # where every vector has its entry already there is nothing to gain
    mean = 1.0 / codes
    return Codebook(
        jnp.where(dead[..., None], fresh, book.entries),
        jnp.where(dead, mean, book.counts),
        jnp.where(dead[..., None], fresh * mean, book.sums),
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
        default=lambda rows, entries: _chunked(rows, entries, in_memory, _product),
    )


def _positions_in_cache(rows: Float[Array, "B P C"]) -> int:
    examples, positions, channels = rows.shape
    return max(1, min(positions, -(-_CACHED // (examples * channels))))


def _nearest(vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]) -> Int[Array, "G n"]:
    """Of a set of vectors that is small already."""
    return jax.lax.platform_dependent(vectors, entries, cpu=_running_minimum, default=_product)


def _chunked(rows: Array, entries: Float[Array, "S G N D"], length: int, nearest: Callable[[Array, Array], Array]) -> Array:
    (stages, groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape

    def chunk(i: Array, found: Array) -> Array:
        start = jnp.minimum(i * length, positions - length)  # the last one overlaps the one before, which changes nothing
        vectors, numbers = _vectors(jax.lax.dynamic_slice_in_dim(rows, start, length, 1), dims), []
        for stage in range(stages):
            numbers.append(nearest(vectors, entries[stage]))
            if stage + 1 < stages:
                vectors = vectors - _at(entries[stage].transpose(0, 2, 1), numbers[-1]).transpose(0, 2, 1)
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
        return jnp.where(closer, found, distance), jnp.where(closer, n, number)

    def several(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        for j in range(_UNROLL):
            best = look(i * _UNROLL + j, best)
        return best

    shape = (vectors.shape[0], vectors.shape[2])
    best = (jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32))
    best = jax.lax.fori_loop(0, codes // _UNROLL, several, best)
    for n in range(codes - codes % _UNROLL, codes):
        best = look(n, best)
    return best[1]


def _product(vectors: Float[Array, "G D n"], entries: Float[Array, "G N D"]) -> Int[Array, "G n"]:
    """For an accelerator: distances less |vector|^2 as a matrix product."""
    products = jnp.einsum("gnd,gdb->gnb", entries, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(entries).sum(-1)[..., None] - 2.0 * products, axis=1).astype(jnp.int32)


# Counting


def _sums(vectors: Float[Array, "G D n"], finite: Array, number: Int[Array, "G n"], codes: int) -> tuple[Array, Array]:
    """How many vectors each entry has, and their sum."""
    groups, dims, _ = vectors.shape
    place = (number + codes * jnp.arange(groups)[:, None]).reshape(-1)
    values = vectors.transpose(0, 2, 1).reshape(-1, dims)
    count = jnp.zeros(groups * codes).at[place].add(finite.reshape(-1).astype(jnp.float32))
    total = jnp.zeros((groups * codes, dims)).at[place].add(values)
    return count.reshape(groups, codes), total.reshape(groups, codes, dims)


def _accumulate(rows: Float[Array, "B P C"], entries: Float[Array, "G N D"]) -> tuple[Array, Array]:
    """Counts and sums over all vectors that are finite, in chunks."""
    (groups, codes, dims), (examples, positions, _) = entries.shape, rows.shape
    length = _positions_in_cache(rows)

    def chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * length, positions - length)
        part = jax.lax.dynamic_slice_in_dim(rows, start, length, 1)
        fresh = jnp.tile(start + jnp.arange(length) >= i * length, examples)  # the last chunk overlaps the one before
        vectors = _vectors(part, dims)
        counted = jnp.isfinite(vectors).all(1) & fresh
        vectors = jnp.where(counted[:, None], vectors, 0.0)
        count, total = _sums(vectors, counted, _nearest(vectors, entries), codes)
        return found[0] + count, found[1] + total

    empty = (jnp.zeros((groups, codes)), jnp.zeros((groups, codes, dims)))
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
