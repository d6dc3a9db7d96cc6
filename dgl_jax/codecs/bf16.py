"""Codec `bf16`: activations rounded to bfloat16, half the bytes of float32."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from dgl_jax.codecs.base import CodecKind, Stateless
from dgl_jax.config.registry import CODECS


@dataclass(frozen=True)
class Bf16(Stateless):
    """Casts activations to bfloat16, with a relative error of at most 2^-8.

    Attributes:
      dtype: dtype of the decoded activations.
    """

    dtype: str = "float32"
    lossless: ClassVar[bool] = False

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> BFloat16[Array, "B ..."]:
        """Rounds activations to the nearest bfloat16."""
        return activations.astype(jnp.bfloat16)

    def decode(self, codebook: Any, payload: BFloat16[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Casts the payload back to `dtype`, without a further rounding error."""
        return payload.astype(self.dtype)


CODECS.ship(bf16=CodecKind(lambda options, dtype: Bf16(dtype)))
