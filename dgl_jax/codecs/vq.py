"""Online vector quantization: activations as codes of a codebook that is learned during training.

C channels are split into G = C / D groups. At every position, each group's D values are replaced by
the number of the nearest of N entries, so a hop takes `log2(N) / D` bits per value. The codebook is
learned from the messages by online k-means: an exponential moving average as in VQ-VAE (van den
Oord et al. 2017, appendix A.1), or mini-batch k-means (Sculley 2010).

The functions are pure, can be jitted, and accept any float array [..., C]:

    book = vq.init(key, x, codes=256, dims=8)              # from a first batch
    codes = vq.encode(book.entries, x)                     # uint8 [..., G]
    x = vq.decode(book.entries, codes)                     # float32 [..., C]
    book, health = vq.update(book, key, x)                 # learns from another batch
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from dgl_jax.codecs.base import check_dims
from dgl_jax.codecs.draws import draw, rows_of
from dgl_jax.codecs.kmeans import (
    ROUNDING,
    SEEDED,
    Codebook,
    accumulate,
    entries_of,
    first_finite,
    nearest_codes,
    nearest_entry,
    pool_of,
    restart_dead,
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
    """Creates a codebook from N vectors of `x`, chosen by k-means++ or by plain sampling.

    For k-means++ see Arthur and Vassilvitskii (2007).

    Args:
      key: random key.
      x: [..., C] activations. Non-finite vectors are never chosen. If fewer vectors are finite than
        there are entries, entries repeat. A group without a finite vector gets zeros, which the
        restarts of `update` replace.
      codes: number of entries N per group, from 1 to 65,536.
      dims: channels per group D; must divide C.
      start: "kmeans++" or "sample"; above 1,024 codes always "sample".

    Returns:
      The codebook.

    Raises:
      UserError: N is out of range or D does not divide C.
    """
    groups_of(codes, dims, x.shape[-1])
    rows = rows_of(x)
    pool, finite = pool_of(rngs.pool(key), rows, codes, dims)
    spread = start == "kmeans++" and codes <= SEEDED
    entries = (spread_start if spread else sampled_start)(key, pool, finite, codes)
    # If many vectors are non-finite, the pool may hold no finite one although `x` does.
    entries = jnp.where(finite.any(-1)[:, None, None], entries, first_finite(rows, dims)[:, None])
    number = nearest_entry(pool, entries)
    seen, moved = sums_of(
        jnp.where(finite[:, None], pool - entries_of(entries, number), 0.0), finite, number, codes
    )
    total = jnp.maximum(seen.sum(-1, keepdims=True), 1.0)
    counts = seen / total
    return Codebook(entries, counts, counts[..., None] * entries + moved / total[..., None], seen)


def encode(entries: Float[Array, "*S G N D"], x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Returns the code of the nearest entry for each channel group of each vector.

    Distances are sums of squared differences in float32, in the order of the dimensions on every
    backend. Their relative error is at most (D + 2) 2^-24, whatever the mean and the spread of the
    data. Two entries whose squared distances differ by more than twice that are therefore
    distinguished alike everywhere, and the chosen entry is never further away than the nearest by
    more than that. Between closer entries compilers may decide differently, because some fuse a
    product and a sum into one rounding. Exact ties go to the lowest number. The square of a
    difference below 1e-19 or above 1e19 is not representable in float32.

    Args:
      entries: [G, N, D] entries of one stage, or [S, G, N, D] of several stages (see
        `residual.py`), each of which encodes the residual of the stages before.
      x: [..., C] activations.

    Returns:
      uint8 [..., S * G] for N <= 256, uint16 above. For N <= 16, 2 to 8 codes are packed into each
      byte of the last axis.
    """
    entries = with_stages(entries)
    stages, groups, codes, _ = entries.shape
    numbers = nearest_codes(rows_of(x), entries)
    return _pack(numbers.reshape(*x.shape[:-1], stages * groups), codes)


def decode(
    entries: Float[Array, "*S G N D"], codes: UInt[Array, "..."], dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """Returns the entries of the given codes, summed over the stages.

    Args:
      entries: [G, N, D] or [S, G, N, D] entries, as in `encode`.
      codes: codes as `encode` returns them.
      dtype: dtype of the result.

    Returns:
      [..., C] activations.
    """
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
    samples: int = 8,
    **how: Any,
) -> tuple[Codebook, dict[str, Float[Array, ""]]]:
    """Moves the entries toward the vectors that are nearest to them.

    Args:
      book: codebook to update.
      key: random key.
      x: [..., C] activations; non-finite vectors are ignored.
      samples: vectors per code that are drawn from `x`; 0: all.
      **how: further arguments of `learn`.

    Returns:
      The new codebook, and metrics; see `learn`.
    """
    rows = rows_of(x)
    drawn = draw(rngs.sample(key), rows, samples * book.entries.shape[1])
    return learn(book, key, rows, drawn, **how)


def learn(
    book: Codebook,
    key: Array,
    rows: Float[Array, "B P C"],
    drawn: Float[Array, "B p C"],
    rule: str = "ema",
    decay: float = 0.9,
    smoothing: float = 1e-5,
    restart: float = 0.01,
    whole: bool = False,
) -> tuple[Codebook, dict[str, Float[Array, ""]]]:
    """Moves the entries toward the drawn vectors that are nearest to them.

    Sums are taken over differences between vectors and entries, so an entry whose vectors all equal
    it does not change by a single bit. Statistics cover the whole batch, also if it is split over
    devices; see `draws.draw`.

    Args:
      book: codebook to update.
      key: random key.
      rows: [B, P, C] all vectors, from which dead entries restart.
      drawn: [B, p, C] vectors to learn from; non-finite ones are ignored.
      rule: "ema": entries follow a moving average of the data; "minibatch": an entry moves by 1 /
        (number of vectors it has seen) and settles.
      decay: decay of the moving averages.
      smoothing: weight of an entry's old value in units of the mean count, so that rarely used
        entries move slowly.
      restart: an entry used less than this share of the mean is dead. It becomes one of `rows`,
        drawn with probability proportional to its squared error, and gets the mean count, which the
        other entries give up in proportion. Vectors that equal their entry up to rounding are not
        drawn, and if entries draw equal vectors only one is restarted. 0: never restart.
      whole: True if every device of a group has all of `rows`.

    Returns:
      The new codebook, and scalar metrics: `perplexity` (codes in use, exp of the entropy of the
      counts, mean over groups), `dead` (share of dead codes), both before restarts, and `skipped`
      (number of non-finite vectors).
    """
    groups, codes, dims = book.entries.shape
    skipped = (~jnp.isfinite(rows).reshape(*rows.shape[:-1], groups, dims).all(-1)).sum(
        dtype=jnp.float32
    )
    count, moved = accumulate(drawn, book.entries)
    number = count.sum(-1, keepdims=True)
    share, moved_mean = (
        count / jnp.maximum(number, 1.0),
        moved / jnp.maximum(number, 1.0)[..., None],
    )
    has_counts = book.counts.sum(-1, keepdims=True) > 0
    # Without a finite vector nothing changes. The first batch with one sets the averages outright.
    weight = jnp.where(number > 0, jnp.where(has_counts, 1.0 - decay, 1.0), 0.0)
    counts = book.counts + weight * (share - book.counts)
    if rule == "ema":
        # Difference between sums and counts * entries. It is 0 except after initialization and for
        # the effect of smoothing, so rounding errors in it are removed.
        excess = book.sums - book.counts[..., None] * book.entries
        excess = jnp.where(jnp.abs(excess) > ROUNDING * jnp.abs(book.sums), excess, 0.0)
        excess = (1.0 - weight[..., None]) * excess + weight[..., None] * moved_mean
        step = excess / jnp.maximum(counts + smoothing / codes, 1e-30)[..., None]
        entries = jnp.where(number[..., None] > 0, book.entries + step, book.entries)
        sums = jnp.where(
            number[..., None] > 0, counts[..., None] * book.entries + excess, book.sums
        )
        new = Codebook(entries, counts, sums, book.seen)
    else:  # an entry is the mean of all vectors it has seen
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
    return (restart_dead(new, key, rows, dead, whole) if restart else new), health


def groups_of(codes: int, dims: int, channels: int) -> int:
    """Returns the number of groups G; raises UserError if N or D does not fit."""
    if not 1 <= codes <= MAX_CODES:
        raise UserError(f"config.codec.codes={codes}: a codebook has from 1 to {MAX_CODES} entries")
    return check_dims(dims, channels)


# Codes smaller than a byte


def bits_of(codes: int) -> int:
    """Returns the number of bits of a code: 1, 2, 4, 8 or 16."""
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
