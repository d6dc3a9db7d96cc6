"""Activations as 256 evenly spaced values between the least and the greatest: a quarter of the bytes of float32."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dgl_jax.codecs.base import CodecKind, GroupOptions, Stateless, check_dims
from dgl_jax.registry import CODECS


class Levels(NamedTuple):
    """Value = low + number * step, with a low and a step for each example and channel group."""

    number: UInt8[Array, "B ..."]
    low: Float[Array, "B G"]
    step: Float[Array, "B G"]


@dataclass(frozen=True)
class Int8(Stateless):
    """Affine, for each example and group of `dims` channels by itself: an image's result does not depend on its neighbours."""

    dims: int = 8
    dtype: str = "float32"
    lossless: ClassVar[bool] = False

    def init(self, activations: Any) -> tuple[()]:
        """Nothing, once the channels are known to divide.

        Raises:
          UserError: `dims` does not divide the channels.
        """
        check_dims(self.dims, activations.shape[-1])
        return ()

    def encode(self, codebook: Any, activations: Float[Array, "B ..."]) -> Levels:
        """Rounds to the nearest level; an error of at most half a step."""
        x = self._grouped(activations.astype(jnp.float32))
        low, high = x.min((1, 3)), x.max((1, 3))
        step = jnp.maximum((high - low) / 255.0, jnp.finfo(jnp.float32).tiny)
        number = jnp.round((x - low[:, None, :, None]) / step[:, None, :, None])
        return Levels(
            jnp.clip(number, 0, 255).astype(jnp.uint8).reshape(activations.shape), low, step
        )

    def decode(self, codebook: Any, payload: Levels) -> Float[Array, "B ..."]:
        """The levels."""
        number = self._grouped(payload.number.astype(jnp.float32))
        x = payload.low[:, None, :, None] + number * payload.step[:, None, :, None]
        return x.reshape(payload.number.shape).astype(self.dtype)

    def _grouped(self, x: Float[Array, "B ..."]) -> Float[Array, "B P G D"]:
        return x.reshape(x.shape[0], -1, x.shape[-1] // self.dims, self.dims)


CODECS.ship(int8=CodecKind(lambda options, dtype: Int8(options.dims, dtype), GroupOptions))
