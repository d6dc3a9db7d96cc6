"""A small Vision Transformer (Dosovitskiy et al. 2021) as an own network: a list of blocks, and one line that registers it.

Between blocks go tokens (B, T, C), so the network may be cut anywhere and each module's head averages over its tokens.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax import UserError
from dgl_jax.models import Network, register_network

PATCH = 2  # pixels a side
DEPTH = 4  # encoder blocks
HEADS = 4  # of the attention


class PatchEmbedding(nn.Module):
    """Cuts images into patches; a Linear layer makes a token of each, and a learnt vector of its position is added."""

    width: int
    patch: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool) -> Float[Array, "B T C"]:
        batch, height, across, channels = x.shape
        if height % self.patch or across % self.patch:
            raise UserError(
                f"config.data.image_size: images of {height}x{across} do not fall into patches of {self.patch} pixels"
            )
        x = x.reshape(
            batch, height // self.patch, self.patch, across // self.patch, self.patch, channels
        )
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, self.patch**2 * channels)
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.width), jnp.float32
        )
        return nn.Dense(self.width, dtype=self.dtype)(x) + position.astype(self.dtype)


class EncoderBlock(nn.Module):
    """Layer norm and self-attention, layer norm and a hidden layer of 2C; each pair is added to what came in."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], train: bool) -> Float[Array, "B T C"]:
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(
            nn.LayerNorm(dtype=self.dtype)(x)
        )
        y = nn.gelu(nn.Dense(2 * width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + nn.Dense(width, dtype=self.dtype)(y)


class Classifier(nn.Module):
    """Layer norm, average over the tokens, Linear."""

    num_classes: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], train: bool) -> Float[Array, "B classes"]:
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(1)
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))


def vit(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Block 0 makes tokens of `width` channels, a multiple of the number of attention heads; the others are encoder blocks."""
    if width % HEADS:
        raise UserError(
            f"config.model.width={width}: must be a multiple of the {HEADS} attention heads"
        )
    return Network(
        (PatchEmbedding(width, PATCH, dtype), *[EncoderBlock(HEADS, dtype)] * DEPTH),
        Classifier(num_classes, dtype),
    )


register_network("vit", vit)
