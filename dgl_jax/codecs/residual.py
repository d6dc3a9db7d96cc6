"""The vq codec: a codebook that is learnt while training goes on and published on a schedule, in one stage or in several.

With S stages each codes what the ones before left over (residual vector quantisation, Juang and Gray 1982), so that S codes of D
values take the bits of one code of D / S values, and see S times as many of them at once; the search takes S times as long.
`init` and `update` are those of `vq.py` for codebooks with an axis of stages in front; `vq.encode` and `vq.decode` take both kinds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from dgl_jax.codecs import vq
from dgl_jax.codecs.base import CodecKind, GroupOptions
from dgl_jax.codecs.kmeans import Codebook
from dgl_jax.core import rngs
from dgl_jax.fields import MANY, choice, number
from dgl_jax.registry import CODECS

_STARTED_FROM = 8  # vectors a code, from which the start of a later stage is drawn


def init(
    key: Array,
    x: Float[Array, "..."],
    stages: int = 1,
    codes: int = 256,
    dims: int = 8,
    start: str = "kmeans++",
) -> Codebook:
    """Codebooks of all stages from data; see `vq.init`."""
    books = [vq.init(key, x, codes, dims, start)]
    rest = vq.draw(rngs.rest(key), vq.rows_of(x), _STARTED_FROM * codes)
    for stage in range(1, stages):
        rest = _left_over(books[-1].entries, rest)
        books.append(vq.init(rngs.stage(key, stage), rest, codes, dims, start))
    return _stacked(books)


def update(
    book: Codebook, key: Array, x: Float[Array, "..."], samples: int = 8, **how: Any
) -> tuple[Codebook, dict[str, Array]]:
    """Moves the entries of all stages; see `vq.update`, whose figures are means over the stages, `skipped` the first one's.

    Args:
      samples: vectors a code that are drawn from `x`, the same ones for every stage; 0: all.
      how: as of `vq.update`.
    """
    stages = [jax.tree.map(lambda leaf, s=s: leaf[s], book) for s in range(len(book.entries))]
    updated, health = [], []
    rest = vq.draw(rngs.sample(key), vq.rows_of(x), samples * book.entries.shape[2])
    for s, of_stage in enumerate(stages):
        if s == 0:
            found = vq.update(of_stage, key, x, samples=samples, **how)
        else:
            rest = _left_over(stages[s - 1].entries, rest)
            found = vq.update(of_stage, rngs.stage(key, s), rest, samples=0, **how)
        updated.append(found[0])
        health.append(found[1])
    mean = jax.tree.map(lambda *values: sum(values) / len(values), *health)
    return _stacked(updated), mean | {"skipped": health[0]["skipped"]}


def _left_over(entries: Float[Array, "G N D"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x - vq.decode(entries, vq.encode(entries, x))


def _stacked(books: Sequence[Codebook]) -> Codebook:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *books)


@dataclass(frozen=True)
class VqOptions(GroupOptions):
    """Online vector quantisation; see `init` and `update`."""

    codes: int = number(256, 1, 65536)  # entries of a group's codebook
    stages: int = number(
        1, 1, 64
    )  # each codes what the ones before left over, with as many bits again
    start: str = choice("kmeans++", "sample")  # from the first batch
    rule: str = choice("ema", "minibatch")  # a moving average, or mini-batch k-means
    decay: float = number(0.9, 0.0, 1.0)  # of the moving averages
    # Weight of an entry's old value, in units of the mean count.
    smoothing: float = number(1e-5, 0.0, 1.0, applies={"codec.rule": ("ema",)})
    restart: float = number(
        0.01, 0.0, 1.0
    )  # an entry used less than this share of the mean begins anew
    samples: int = number(8, 0, MANY)  # vectors a code that an update looks at; 0: all of the batch
    # Steps; 0: so that codebooks take under a tenth of the codes' bytes.
    codebook_every: int = number(0, 0, MANY)
    # With the codebook a packet was encoded with when it entered the ring, or the newest.
    decode: str = choice("sent", "latest", applies={"engine.asynchronous": (True,)})


@dataclass(frozen=True)
class Vq:
    """The codec: a codebook that is learnt, and a published copy of it, which alone encodes and decodes.

    Attributes:
      codes, dims: N and D.
      stages: S; each codes what the ones before left over.
      every: updates after which the learnt codebook is published (and then travels); 0: so seldom that codebooks take less than a
        tenth of the bytes of the codes.
      start, rule, decay, smoothing, restart, samples: see `init` and `update`.
      dtype: of what `decode` gives.
    """

    codes: int = 256
    dims: int = 8
    stages: int = 1
    every: int = 0
    start: str = "kmeans++"
    rule: str = "ema"
    decay: float = 0.9
    smoothing: float = 1e-5
    restart: float = 0.01
    samples: int = 8
    dtype: str = "float32"
    lossless: ClassVar[bool] = False

    def init(self, activations: jax.ShapeDtypeStruct) -> Any:
        """Zeros of the right shapes: the first update begins with its own batch."""
        groups = vq.groups_of(self.codes, self.dims, activations.shape[-1])
        entries = jnp.zeros((self.stages, groups, self.codes, self.dims), jnp.float32)
        counts = jnp.zeros(entries.shape[:-1], jnp.float32)
        return {"learnt": Codebook(entries, counts, entries, counts), "published": entries}

    def publish(
        self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]
    ) -> Any:
        """Before a packet is encoded: starts at the first update, publishes what has been learnt where it is time."""

        def started() -> Codebook:
            return init(
                key, activations.astype(jnp.float32), self.stages, self.codes, self.dims, self.start
            )

        learnt = jax.lax.cond(updates == 0, started, lambda: state["learnt"])
        due = updates % self.period(activations) == 0
        return {"learnt": learnt, "published": jnp.where(due, learnt.entries, state["published"])}

    def update(
        self, state: Any, key: Array, activations: Float[Array, "B ..."]
    ) -> tuple[Any, dict[str, Array]]:
        """Learns from a packet; what is published stays."""
        how = {
            "rule": self.rule,
            "decay": self.decay,
            "smoothing": self.smoothing,
            "restart": self.restart,
        }
        book, health = update(state["learnt"], key, activations, self.samples, **how)
        return state | {"learnt": book}, {f"codec_{name}": value for name, value in health.items()}

    def codebook(self, state: Any) -> Float[Array, "S G N D"]:
        """The published entries."""
        return state["published"]

    def period(self, activations: Any) -> int:
        """Updates from one publication to the next."""
        if self.every:
            return self.every
        channels = activations.shape[-1]
        positions = math.prod(activations.shape[:-1])
        packet = positions * math.ceil(
            self.stages * (channels // self.dims) * vq.bits_of(self.codes) / 8
        )
        return math.ceil(10 * 4 * self.stages * self.codes * channels / packet)

    def encode(
        self, codebook: Float[Array, "S G N D"], activations: Float[Array, "B ..."]
    ) -> UInt[Array, "B ..."]:
        """Codes."""
        return vq.encode(codebook, activations)

    def decode(
        self, codebook: Float[Array, "S G N D"], payload: UInt[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """Entries."""
        return vq.decode(codebook, payload, jnp.dtype(self.dtype))


def _make(options: VqOptions, dtype: str) -> Vq:
    shared = {
        name: getattr(options, name)
        for name in ("codes", "dims", "stages", "start", "rule", "decay", "smoothing")
    }
    return Vq(
        **shared,
        restart=options.restart,
        samples=options.samples,
        every=options.codebook_every,
        dtype=dtype,
    )


CODECS.ship(vq=CodecKind(_make, VqOptions))
