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
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from dgl_jax.codecs.base import check_dims
from dgl_jax.codecs.kmeans import (
    ROUNDING,
    SEEDED,
    Codebook,
    accumulate,
    draw,
    entries_of,
    first_finite,
    nearest_codes,
    nearest_entry,
    pool_of,
    restart_dead,
    rows_of,
    sampled_start,
    spread_start,
    sums_of,
    with_stages,
)
from dgl_jax.core import rngs
from dgl_jax.errors import UserError

MAX_CODES = 65_536


def init(
    key: Array, x: Float[Array, "..."], codes: int = 256, dims: int = 8, start: str = "kmeans++"
) -> Codebook:
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
    pool, finite = pool_of(rngs.pool(key), rows, codes, dims)
    spread = start == "kmeans++" and codes <= SEEDED
    entries = (spread_start if spread else sampled_start)(key, pool, finite, codes)
    # Of many broken vectors the pool may hold nothing else.
    entries = jnp.where(finite.any(-1)[:, None, None], entries, first_finite(rows, dims)[:, None])
    number = nearest_entry(pool, entries)
    seen, moved = sums_of(
        jnp.where(finite[:, None], pool - entries_of(entries, number), 0.0), finite, number, codes
    )
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
    entries = with_stages(entries)
    stages, groups, codes, _ = entries.shape
    found = nearest_codes(rows_of(x), entries)
    return _pack(found.reshape(*x.shape[:-1], stages * groups), codes)


def decode(
    entries: Float[Array, "*S G N D"], codes: UInt[Array, "..."], dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """The entries of those numbers, summed over the stages, [..., C]."""
    entries = with_stages(entries)
    stages, groups, count, dims = entries.shape
    numbers = jnp.split(_unpack(codes, count, stages * groups), stages, axis=-1)
    flat = entries.reshape(stages, groups * count, dims)
    parts = [
        jnp.take(e, n + count * jnp.arange(groups, dtype=jnp.int32), axis=0, mode="clip")
        for e, n in zip(flat, numbers)
    ]
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
    skipped = (~jnp.isfinite(rows).reshape(*rows.shape[:-1], groups, dims).all(-1)).sum(
        dtype=jnp.float32
    )
    count, moved = accumulate(draw(rngs.sample(key), rows, samples * codes), book.entries)
    number = count.sum(-1, keepdims=True)
    share, moved_mean = (
        count / jnp.maximum(number, 1.0),
        moved / jnp.maximum(number, 1.0)[..., None],
    )
    known = book.counts.sum(-1, keepdims=True) > 0
    # Nothing finite: nothing learnt. Nothing known yet: the average is that of this batch.
    weight = jnp.where(number > 0, jnp.where(known, 1.0 - decay, 1.0), 0.0)
    counts = book.counts + weight * (share - book.counts)
    if rule == "ema":
        # How far the sums are from what the entries make of the counts; but for the start and the smoothing not at all.
        ahead = book.sums - book.counts[..., None] * book.entries
        ahead = jnp.where(jnp.abs(ahead) > ROUNDING * jnp.abs(book.sums), ahead, 0.0)
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
    health = {
        "perplexity": jnp.exp(entropy).mean(),
        "dead": dead.mean(dtype=jnp.float32),
        "skipped": skipped,
    }
    return (restart_dead(new, key, rows, dead) if restart else new), health


def groups_of(codes: int, dims: int, channels: int) -> int:
    """G; raises UserError where N or D does not fit."""
    if not 1 <= codes <= MAX_CODES:
        raise UserError(f"config.codec.codes={codes}: a codebook has from 1 to {MAX_CODES} entries")
    return check_dims(dims, channels)


# Codes of less than a byte


def bits_of(codes: int) -> int:
    """Bits of a code: 1, 2, 4, 8 or 16."""
    return next(bits for bits in (1, 2, 4, 8, 16) if codes <= 2**bits)


def _pack(numbers: UInt[Array, "... G"], codes: int) -> UInt[Array, "..."]:
    if (bits := bits_of(codes)) >= 8:
        return numbers
    each = 8 // bits
    padded = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % each)])
    parts = padded.reshape(*numbers.shape[:-1], -1, each) << (
        bits * jnp.arange(each, dtype=jnp.uint8)
    )
    return parts.sum(-1, dtype=jnp.uint8)


def _unpack(packed: UInt[Array, "..."], codes: int, groups: int) -> Int[Array, "... G"]:
    if (bits := bits_of(codes)) >= 8:
        return packed.astype(jnp.int32)
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    parts = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)[..., :groups].astype(jnp.int32)
