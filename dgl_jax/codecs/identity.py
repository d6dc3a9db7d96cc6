"""Codec `identity`: activations without any encoding."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float

from dgl_jax.codecs.base import CodecKind, Stateless
from dgl_jax.config.registry import CODECS


@dataclass(frozen=True)
class Identity(Stateless):
    """Sends activations unchanged.

    Attributes:
      dtype: dtype of the activations.
    """

    dtype: str = "float32"
    lossless: ClassVar[bool] = True

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Returns the activations unchanged."""
        return activations

    def decode(self, codebook: Any, payload: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Returns the payload unchanged."""
        return payload


CODECS.ship(identity=CodecKind(lambda options, dtype: Identity(dtype), lossless=True))
