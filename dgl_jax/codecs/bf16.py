"""Activations rounded to bfloat16: half the bytes of float32, a relative error of at most 2^-8."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from dgl_jax.codecs.base import CodecKind, Stateless
from dgl_jax.registry import CODECS


@dataclass(frozen=True)
class Bf16(Stateless):
    """A cast; `dtype` is what decode gives back."""

    dtype: str = "float32"
    lossless: ClassVar[bool] = False

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> BFloat16[Array, "B ..."]:
        """Rounds to the nearest bfloat16."""
        return activations.astype(jnp.bfloat16)

    def decode(self, codebook: Any, payload: BFloat16[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Exact."""
        return payload.astype(self.dtype)


CODECS.ship(bf16=CodecKind(lambda options, dtype: Bf16(dtype)))
