"""What a packet's payload looks like on the wire and in a replay ring: one frozen dataclass of pure functions a codec."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dgl_jax.codecs.bf16 import Bf16
from dgl_jax.codecs.identity import Identity
from dgl_jax.codecs.int8 import Int8
from dgl_jax.codecs.residual import Vq
from dgl_jax.config import CodecSettings


class Codec(Protocol):
    """Encodes activations on the producer's devices and decodes them on the consumer's; all functions are pure.

    A codec may learn a codebook while packets pass: its state lies with the producer, and a published copy travels to the consumer
    every `period` updates. What is published encodes and decodes; what is learnt in between does not matter to a packet. Codecs
    without a codebook have `()` for all of that.
    """

    lossless: ClassVar[bool]

    def init(self, activations: jax.ShapeDtypeStruct) -> Any:
        """The state before the first update; raises UserError where the codec does not fit such activations."""

    def publish(self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]) -> Any:
        """The state with which the packet of this update is encoded: publishes where `updates` is a multiple of the period."""

    def update(self, state: Any, key: Array, activations: Float[Array, "B ..."]) -> tuple[Any, dict[str, Array]]:
        """The state that has learnt from a packet, and metrics."""

    def codebook(self, state: Any) -> Any:
        """What is published."""

    def period(self, activations: Any) -> int:
        """Updates from one publication to the next, for activations of this shape; 0: there is nothing to publish."""

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> Any:
        """Activations to the payload, a pytree of arrays."""

    def decode(self, codebook: Any, payload: Any) -> Float[Array, "B ..."]:
        """The payload back to activations."""


def make_codec(settings: CodecSettings, dtype: str) -> Codec:
    """The configured codec for activations of that dtype."""
    return CODECS[settings.name](settings, jnp.dtype(dtype).name)


def relative_error(original: Float[Array, "B ..."], decoded: Float[Array, "B ..."]) -> Float[Array, ""]:
    """||decoded - original|| / ||original||, in float32."""
    original, decoded = original.astype(jnp.float32), decoded.astype(jnp.float32)
    return jnp.linalg.norm((decoded - original).ravel()) / jnp.maximum(jnp.linalg.norm(original.ravel()), 1e-30)


CODECS: dict[str, Callable[[CodecSettings, str], Codec]] = {
    "identity": lambda settings, dtype: Identity(dtype),
    "bf16": lambda settings, dtype: Bf16(dtype),
    "int8": lambda settings, dtype: Int8(settings.dims, dtype),
    "vq": lambda settings, dtype: Vq(
        settings.codes,
        settings.dims,
        settings.stages,
        settings.codebook_every,
        settings.start,
        settings.rule,
        settings.decay,
        settings.smoothing,
        settings.restart,
        settings.samples,
        dtype,
    ),
}

__all__ = ["CODECS", "Bf16", "Codec", "Identity", "Int8", "Vq", "make_codec", "relative_error"]
