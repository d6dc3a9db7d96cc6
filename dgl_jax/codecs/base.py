"""What a codec is: a frozen dataclass of pure functions that encode what crosses between modules, and what rings hold."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dgl_jax.config import CodecSettings
from dgl_jax.errors import UserError
from dgl_jax.fields import number
from dgl_jax.registry import CODECS, Kind


@dataclass(frozen=True)
class CodecKind(Kind):
    """A codec: `make(options, dtype)` returns a `Codec` for activations of that dtype.

    Attributes:
      lossless: decoding gives back every bit.
    """

    lossless: bool = False


@dataclass(frozen=True)
class GroupOptions(CodecSettings):
    """Of codecs that cut channels into groups."""

    dims: int = number(8, 1, 65536)  # channels a group


class Codec(Protocol):
    """Encodes activations on the producer's devices and decodes them on the consumer's; all functions are pure.

    A codec may learn a codebook while packets pass: its state lies with the producer, and a published copy travels to the consumer
    every `period` updates. What is published encodes and decodes; what is learnt in between does not matter to a packet. Codecs
    without a codebook have `()` for all of that.
    """

    lossless: ClassVar[bool]

    def init(self, activations: jax.ShapeDtypeStruct) -> Any:
        """The state before the first update; raises UserError where the codec does not fit such activations."""

    def publish(
        self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]
    ) -> Any:
        """The state with which the packet of this update is encoded: publishes where `updates` is a multiple of the period."""

    def update(
        self, state: Any, key: Array, activations: Float[Array, "B ..."]
    ) -> tuple[Any, dict[str, Array]]:
        """The state that has learnt from a packet, and metrics."""

    def codebook(self, state: Any) -> Any:
        """What is published."""

    def period(self, activations: Any) -> int:
        """Updates from one publication to the next, for activations of this shape; 0: there is nothing to publish."""

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> Any:
        """Activations to the payload, a pytree of arrays."""

    def decode(self, codebook: Any, payload: Any) -> Float[Array, "B ..."]:
        """The payload back to activations."""


class Stateless:
    """Learns nothing and publishes nothing."""

    def init(self, activations: jax.ShapeDtypeStruct) -> tuple[()]:
        """Nothing."""
        return ()

    def publish(
        self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]
    ) -> tuple[()]:
        """Nothing."""
        return ()

    def update(
        self, state: Any, key: Array, activations: Float[Array, "B ..."]
    ) -> tuple[tuple[()], dict[str, Array]]:
        """Nothing."""
        return (), {}

    def codebook(self, state: Any) -> tuple[()]:
        """None."""
        return ()

    def period(self, activations: Any) -> int:
        """Never."""
        return 0


def make_codec(options: CodecSettings, dtype: str) -> Codec:
    """Returns the configured codec for activations of that dtype."""
    return CODECS[options.name].make(options, jnp.dtype(dtype).name)


def relative_error(
    original: Float[Array, "B ..."], decoded: Float[Array, "B ..."]
) -> Float[Array, ""]:
    """||decoded - original|| / ||original||, in float32."""
    original, decoded = original.astype(jnp.float32), decoded.astype(jnp.float32)
    return jnp.linalg.norm((decoded - original).ravel()) / jnp.maximum(
        jnp.linalg.norm(original.ravel()), 1e-30
    )


def check_dims(dims: int, channels: int) -> int:
    """How many groups of so many channels there are.

    Raises:
      UserError: the channels do not divide.
    """
    if dims < 1 or channels % dims:
        fits = [d for d in range(1, channels + 1) if channels % d == 0]
        near = sorted(sorted(fits, key=lambda d: abs(d - dims))[:3])
        raise UserError(
            f"config.codec.dims={dims}: does not divide {channels} channels; {', '.join(map(str, near))} would do"
        )
    return channels // dims
