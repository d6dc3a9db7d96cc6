"""What a packet's payload looks like on the wire and in a replay ring: one frozen dataclass of pure functions a codec."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from dgl_jax.codecs.bf16 import Bf16
from dgl_jax.codecs.identity import Identity


class Codec(Protocol):
    """Encodes activations on the producer's devices and decodes them on the consumer's; both functions are pure."""

    lossless: ClassVar[bool]

    def encode(self, activations: Float[Array, "B ..."]) -> Any:
        """Activations to the payload, a pytree of arrays."""

    def decode(self, payload: Any) -> Float[Array, "B ..."]:
        """The payload back to activations."""


def make_codec(name: str, dtype: str) -> Codec:
    """The codec of that name for activations of that dtype."""
    return CODECS[name](jnp.dtype(dtype).name)


def relative_error(original: Float[Array, "B ..."], decoded: Float[Array, "B ..."]) -> Float[Array, ""]:
    """||decoded - original|| / ||original||, in float32."""
    original, decoded = original.astype(jnp.float32), decoded.astype(jnp.float32)
    return jnp.linalg.norm((decoded - original).ravel()) / jnp.maximum(jnp.linalg.norm(original.ravel()), 1e-30)


CODECS: dict[str, Callable[[str], Codec]] = {"identity": Identity, "bf16": Bf16}

__all__ = ["CODECS", "Bf16", "Codec", "Identity", "make_codec", "relative_error"]
