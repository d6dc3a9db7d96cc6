"""Activations as they are."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float


@dataclass(frozen=True)
class Identity:
    """Changes no bit."""

    dtype: str = "float32"
    lossless: ClassVar[bool] = True

    def encode(self, activations: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """The activations themselves."""
        return activations

    def decode(self, payload: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """The payload itself."""
        return payload
