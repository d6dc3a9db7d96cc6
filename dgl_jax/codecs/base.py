"""Interface of a codec, which encodes the activations that modules and rings exchange."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dgl_jax.config import CodecSettings
from dgl_jax.config.fields import number
from dgl_jax.config.registry import CODECS, Kind
from dgl_jax.errors import UserError


@dataclass(frozen=True)
class CodecKind(Kind):
    """Registry entry of a codec: `make(options, dtype)` returns a `Codec` for that dtype.

    Attributes:
      lossless: decoding returns every bit of the activations.
    """

    lossless: bool = False


@dataclass(frozen=True)
class GroupOptions(CodecSettings):
    """Options of codecs that split the channels into groups.

    Attributes:
      dims: channels per group; must divide the channels of every message.
    """

    dims: int = number(8, 1, 65536)


class Codec(Protocol):
    """Encodes activations on the producer's devices and decodes them on the consumer's.

    A codec is a frozen dataclass of pure functions; the caller holds its state. It may learn a
    codebook from the messages. The state then stays with the producer, and every `period` updates a
    copy of the learned codebook is published and sent to the consumer. Only the published codebook
    encodes and decodes, so updates in between do not affect any message. Codecs without a codebook
    return `()` for state and codebook.

    Attributes:
      lossless: decoding returns every bit of the activations.
    """

    lossless: ClassVar[bool]

    def init(self, activations: jax.ShapeDtypeStruct) -> Any:
        """Returns the state before the first update; raises UserError if the shape does not fit."""

    def publish(
        self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]
    ) -> Any:
        """Returns the state that encodes the message of this update.

        Publishes the learned codebook if `updates` is a multiple of the period.

        Args:
          state: state of the codec.
          key: random key.
          activations: [B, ...] activations that are about to be encoded.
          updates: [] number of updates that the producer has made.
        """

    def update(
        self, state: Any, key: Array, activations: Float[Array, "B ..."]
    ) -> tuple[Any, dict[str, Array]]:
        """Updates the state with a batch of activations.

        Args:
          state: state of the codec.
          key: random key.
          activations: [B, ...] activations to learn from.

        Returns:
          The new state, and metrics by name.
        """

    def codebook(self, state: Any) -> Any:
        """Returns the published codebook."""

    def period(self, activations: Any) -> int:
        """Returns the number of updates between publications; 0 if there is no codebook."""

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> Any:
        """Returns the payload of the activations, a pytree of arrays with leading axis B."""

    def decode(self, codebook: Any, payload: Any) -> Float[Array, "B ..."]:
        """Returns the activations of a payload, [B, ...]."""


class Stateless:
    """Base class of codecs that learn nothing and publish nothing."""

    def init(self, activations: jax.ShapeDtypeStruct) -> tuple[()]:
        """Returns the empty state."""
        return ()

    def publish(
        self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]
    ) -> tuple[()]:
        """Returns the empty state."""
        return ()

    def update(
        self, state: Any, key: Array, activations: Float[Array, "B ..."]
    ) -> tuple[tuple[()], dict[str, Array]]:
        """Returns the empty state and no metrics."""
        return (), {}

    def codebook(self, state: Any) -> tuple[()]:
        """Returns the empty codebook."""
        return ()

    def period(self, activations: Any) -> int:
        """Returns 0, because there is nothing to publish."""
        return 0


def make_codec(options: CodecSettings, dtype: str) -> Codec:
    """Returns the configured codec for activations of the given dtype."""
    return CODECS[options.name].make(options, jnp.dtype(dtype).name)


def relative_error(
    original: Float[Array, "B ..."], decoded: Float[Array, "B ..."]
) -> Float[Array, ""]:
    """Returns ||decoded - original|| / ||original|| over all values, computed in float32."""
    original, decoded = original.astype(jnp.float32), decoded.astype(jnp.float32)
    return jnp.linalg.norm((decoded - original).ravel()) / jnp.maximum(
        jnp.linalg.norm(original.ravel()), 1e-30
    )


def encode_message(
    codec: Codec,
    state: Any,
    key: Array,
    values: Float[Array, "B ..."],
    updates: Int[Array, ""],
) -> tuple[Any, Any, Any, dict[str, Array]]:
    """Encodes the values of a message.

    Args:
      codec: codec of the message.
      state: the sender's state of the codec; `()` or None if the codec has none.
      key: random key of the message.
      values: [B, ...] values to send.
      updates: [] number of messages that were sent before.

    Returns:
      The state after a publication; the codebook that encodes the message; the payload; and the
      metric `codec_error` (relative error of the decoded values) unless the codec is lossless.
    """
    published = codec.publish(state, key, values, updates)
    codebook = codec.codebook(published)
    payload = codec.encode(codebook, values)
    metrics = (
        {}
        if codec.lossless
        else {"codec_error": relative_error(values, codec.decode(codebook, payload))}
    )
    return published, codebook, payload, metrics


def encode_and_learn(
    codec: Codec,
    state: Any,
    key: Array,
    values: Float[Array, "B ..."],
    updates: Int[Array, ""],
) -> tuple[Any, Any, Any, dict[str, Array]]:
    """Encodes the values of a message and updates the codec with them afterwards.

    See `encode_message` for arguments and results; the metrics of the update are added.
    """
    published, codebook, payload, metrics = encode_message(codec, state, key, values, updates)
    learned, health = codec.update(published, key, values)
    return learned, codebook, payload, metrics | health


def check_dims(dims: int, channels: int) -> int:
    """Returns the number of groups of `dims` channels each.

    Raises:
      UserError: `dims` does not divide the number of channels.
    """
    if dims < 1 or channels % dims:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - dims))[:3])
        raise UserError(
            f"config.codec.dims={dims}: does not divide {channels} channels; "
            f"{', '.join(map(str, nearest))} would do"
        )
    return channels // dims
