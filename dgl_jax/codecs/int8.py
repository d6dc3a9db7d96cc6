"""Codec `int8`: activations as 256 evenly spaced levels, a quarter of the bytes of float32."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dgl_jax.codecs.base import CodecKind, GroupOptions, Stateless, check_dims
from dgl_jax.config.registry import CODECS


class Levels(NamedTuple):
    """Payload of `int8`: value = low + number * step.

    Attributes:
      number: [B, ..., C] level of each value.
      low: [B, G] lowest value of each example and channel group.
      step: [B, G] distance between two levels.
    """

    number: UInt8[Array, "B ..."]
    low: Float[Array, "B G"]
    step: Float[Array, "B G"]


@dataclass(frozen=True)
class Int8(Stateless):
    """Quantizes affinely, with separate levels for each example and group of `dims` channels.

    An example's result therefore does not depend on the others in its batch.

    Attributes:
      dims: channels per group.
      dtype: dtype of the decoded activations.
    """

    dims: int = 8
    dtype: str = "float32"
    lossless: ClassVar[bool] = False

    def init(self, activations: Any) -> tuple[()]:
        """Returns the empty state.

        Raises:
          UserError: `dims` does not divide the number of channels.
        """
        check_dims(self.dims, activations.shape[-1])
        return ()

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> Levels:
        """Rounds each value to the nearest level, with an error of at most half a step."""
        x = self._grouped(activations.astype(jnp.float32))
        low, high = x.min((1, 3)), x.max((1, 3))
        step = jnp.maximum((high - low) / 255.0, jnp.finfo(jnp.float32).tiny)
        number = jnp.round((x - low[:, None, :, None]) / step[:, None, :, None])
        return Levels(
            jnp.clip(number, 0, 255).astype(jnp.uint8).reshape(activations.shape), low, step
        )

    def decode(self, codebook: Any, payload: Levels) -> Float[Array, "B ..."]:
        """Returns the values of the levels."""
        number = self._grouped(payload.number.astype(jnp.float32))
        x = payload.low[:, None, :, None] + number * payload.step[:, None, :, None]
        return x.reshape(payload.number.shape).astype(self.dtype)

    def _grouped(self, x: Float[Array, "B ..."]) -> Float[Array, "B P G D"]:
        return x.reshape(x.shape[0], -1, x.shape[-1] // self.dims, self.dims)


CODECS.ship(int8=CodecKind(lambda options, dtype: Int8(options.dims, dtype), GroupOptions))
