"""Activations rounded to bfloat16: half the bytes of float32, a relative error of at most 2^-8."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float


@dataclass(frozen=True)
class Bf16:
    """A cast; `dtype` is what decode gives back."""

    dtype: str = "float32"
    lossless: ClassVar[bool] = False

    def encode(self, activations: Float[Array, "B ..."]) -> BFloat16[Array, "B ..."]:
        """Rounds to the nearest bfloat16."""
        return activations.astype(jnp.bfloat16)

    def decode(self, payload: BFloat16[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Exact."""
        return payload.astype(self.dtype)
