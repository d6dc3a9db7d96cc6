"""Codec `vq`: a codebook that is learned during training and published on a schedule.

With S > 1 stages, each stage encodes the residual of the stages before (residual vector
quantization, Juang and Gray 1982). S codes for D values then take as many bits as one code for each
D / S values, but each code sees S times as many values at once; the search takes S times as long.
`init` and `update` extend those in `vq.py` to codebooks with a leading axis of stages; `vq.encode`
and `vq.decode` accept both kinds.
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
from dgl_jax.config.fields import MANY, choice, number
from dgl_jax.config.registry import CODECS
from dgl_jax.core import rngs

_STARTED_FROM = 8  # vectors per code from which the second and later stages are initialized


def init(
    key: Array,
    x: Float[Array, "..."],
    stages: int = 1,
    codes: int = 256,
    dims: int = 8,
    start: str = "kmeans++",
) -> Codebook:
    """Creates the codebooks of all stages from data; see `vq.init`.

    Args:
      key: random key.
      x: [..., C] activations.
      stages: number of stages S.
      codes: number of entries N per group and stage.
      dims: channels per group D.
      start: "kmeans++" or "sample".

    Returns:
      A codebook whose fields have a leading axis S.
    """
    books = [vq.init(key, x, codes, dims, start)]
    residual = vq.draw(rngs.rest(key), vq.rows_of(x), _STARTED_FROM * codes)
    for stage in range(1, stages):
        residual = _residual(books[-1].entries, residual)
        books.append(vq.init(rngs.stage(key, stage), residual, codes, dims, start))
    return _stacked(books)


def update(
    book: Codebook, key: Array, x: Float[Array, "..."], samples: int = 8, **how: Any
) -> tuple[Codebook, dict[str, Array]]:
    """Moves the entries of all stages; see `vq.update`.

    Args:
      book: codebook of S stages.
      key: random key.
      x: [..., C] activations.
      samples: vectors per code that are drawn from `x`, the same ones for every stage; 0: all.
      **how: further arguments of `vq.learn`.

    Returns:
      The new codebook, and the metrics of `vq.learn` as means over the stages, except `skipped`,
      which counts the first stage only.
    """
    stages = [jax.tree.map(lambda leaf, s=s: leaf[s], book) for s in range(len(book.entries))]
    updated, health = [], []
    rows = vq.rows_of(x)
    drawn = vq.draw(rngs.sample(key), rows, samples * book.entries.shape[2])
    for s, stage_book in enumerate(stages):
        if s == 0:
            result = vq.learn(stage_book, key, rows, drawn, **how)
        else:
            drawn = _residual(stages[s - 1].entries, drawn)
            whole = samples > 0
            result = vq.learn(stage_book, rngs.stage(key, s), drawn, drawn, whole=whole, **how)
        updated.append(result[0])
        health.append(result[1])
    means = jax.tree.map(lambda *values: sum(values) / len(values), *health)
    return _stacked(updated), means | {"skipped": health[0]["skipped"]}


def _residual(entries: Float[Array, "G N D"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x - vq.decode(entries, vq.encode(entries, x))


def _stacked(books: Sequence[Codebook]) -> Codebook:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *books)


@dataclass(frozen=True)
class VqOptions(GroupOptions):
    """Options of online vector quantization; see `init` and `update`.

    Attributes:
      codes: number of codebook entries per group.
      stages: number of stages; each encodes the residual of the stages before, with as many bits.
      start: initialization of the codebook from the first batch.
      rule: update of the codebook: moving average, or mini-batch k-means.
      decay: decay of the moving averages.
      smoothing: weight of an entry's old value, in units of the mean count.
      restart: an entry used less than this share of the mean is restarted; 0: never.
      samples: vectors per code that an update uses; 0: the whole batch.
      codebook_every: updates between publications of the codebook; 0: chosen so that codebooks take
        at most a tenth of the bytes.
      decode: decode a message with the codebook it was encoded with, or with the newest one.
    """

    codes: int = number(256, 1, 65536)
    stages: int = number(1, 1, 64)
    start: str = choice("kmeans++", "sample")
    rule: str = choice("ema", "minibatch")
    decay: float = number(0.9, 0.0, 1.0)
    smoothing: float = number(1e-5, 0.0, 1.0, applies={"codec.rule": ("ema",)})
    restart: float = number(0.01, 0.0, 1.0)
    samples: int = number(8, 0, MANY)
    codebook_every: int = number(0, 0, MANY)
    decode: str = choice("sent", "latest", applies={"engine.asynchronous": (True,)})


@dataclass(frozen=True)
class Vq:
    """Encodes activations with the published copy of a codebook that is learned online.

    Attributes:
      codes: number of entries N per group.
      dims: channels per group D.
      stages: number of stages S; each encodes the residual of the stages before.
      every: updates between publications of the learned codebook, which is then sent; 0: the
        smallest number at which codebooks take at most a tenth of the bytes of the codes.
      start: see `init`.
      rule: see `vq.learn`.
      decay: see `vq.learn`.
      smoothing: see `vq.learn`.
      restart: see `vq.learn`.
      samples: see `update`.
      dtype: dtype of the decoded activations.
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
        """Returns a state of zeros; the first `publish` initializes it from its batch."""
        groups = vq.groups_of(self.codes, self.dims, activations.shape[-1])
        entries = jnp.zeros((self.stages, groups, self.codes, self.dims), jnp.float32)
        counts = jnp.zeros(entries.shape[:-1], jnp.float32)
        return {"learnt": Codebook(entries, counts, entries, counts), "published": entries}

    def publish(
        self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]
    ) -> Any:
        """Initializes the codebook at the first update, and publishes it if publication is due."""

        def started() -> Codebook:
            return init(
                key, activations.astype(jnp.float32), self.stages, self.codes, self.dims, self.start
            )

        learnt = jax.lax.cond(updates == 0, started, lambda: state["learnt"])
        is_due = updates % self.period(activations) == 0
        return {
            "learnt": learnt,
            "published": jnp.where(is_due, learnt.entries, state["published"]),
        }

    def update(
        self, state: Any, key: Array, activations: Float[Array, "B ..."]
    ) -> tuple[Any, dict[str, Array]]:
        """Learns from a batch of activations; the published codebook does not change."""
        options = {
            "rule": self.rule,
            "decay": self.decay,
            "smoothing": self.smoothing,
            "restart": self.restart,
        }
        book, health = update(state["learnt"], key, activations, self.samples, **options)
        return state | {"learnt": book}, {f"codec_{name}": value for name, value in health.items()}

    def codebook(self, state: Any) -> Float[Array, "S G N D"]:
        """Returns the published entries."""
        return state["published"]

    def period(self, activations: Any) -> int:
        """Returns the number of updates between publications."""
        if self.every:
            return self.every
        channels = activations.shape[-1]
        positions = math.prod(activations.shape[:-1])
        message_bytes = positions * math.ceil(
            self.stages * (channels // self.dims) * vq.bits_of(self.codes) / 8
        )
        return math.ceil(10 * 4 * self.stages * self.codes * channels / message_bytes)

    def encode(
        self, codebook: Float[Array, "S G N D"], activations: Float[Array, "B ..."]
    ) -> UInt[Array, "B ..."]:
        """Returns the codes of the activations, as `vq.encode` does."""
        return vq.encode(codebook, activations)

    def decode(
        self, codebook: Float[Array, "S G N D"], payload: UInt[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """Returns the activations of the codes, as `vq.decode` does."""
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
