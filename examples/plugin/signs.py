"""Codec with one bit per value: the signs, and the mean magnitude of each example."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from dgl_jax.codecs import CodecKind, Stateless, register_codec
from dgl_jax.config import CodecSettings


@dataclass(frozen=True)
class Signs(Stateless):
    """Packs eight signs into a byte along the last axis, whose length must be a multiple of 8."""

    dtype: str
    lossless: ClassVar[bool] = False

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> dict[str, Array]:
        """Returns `bits`, uint8 [B, ..., C / 8], and `scale`, float32 [B]."""
        scale = jnp.abs(activations.astype(jnp.float32)).mean(tuple(range(1, activations.ndim)))
        return {"bits": jnp.packbits(activations >= 0, axis=-1), "scale": scale}

    def decode(self, codebook: Any, payload: dict[str, Array]) -> Float[Array, "B ..."]:
        """Returns plus or minus the scale of each example."""
        signs = 2.0 * jnp.unpackbits(payload["bits"], axis=-1).astype(jnp.float32) - 1.0
        return (signs * payload["scale"].reshape(-1, *[1] * (signs.ndim - 1))).astype(self.dtype)


def make(options: CodecSettings, dtype: str) -> Signs:
    """Returns the codec for activations of a dtype."""
    return Signs(dtype)


register_codec("signs", CodecKind(make))
