"""Small Vision Transformer (Dosovitskiy et al. 2021) as an example of a user-defined network.

It is a list of blocks and one line that registers it. Blocks exchange tokens [B, T, C], so the
network may be cut anywhere, and each module's head averages over its tokens.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax import UserError
from dgl_jax.models import Network, register_network

PATCH = 2  # side of a patch in pixels
DEPTH = 4  # number of encoder blocks
HEADS = 4  # number of attention heads


class PatchEmbedding(nn.Module):
    """Block that projects patches of the image to tokens and adds learned position embeddings."""

    width: int
    patch: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool) -> Float[Array, "B T C"]:
        batch, height, image_width, channels = x.shape
        if height % self.patch or image_width % self.patch:
            raise UserError(
                f"config.data.image_size: images of {height}x{image_width} pixels do not split "
                f"into patches of {self.patch}x{self.patch} pixels"
            )
        x = x.reshape(
            batch, height // self.patch, self.patch, image_width // self.patch, self.patch, channels
        )
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, self.patch**2 * channels)
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.width), jnp.float32
        )
        return nn.Dense(self.width, dtype=self.dtype)(x) + position.astype(self.dtype)


class EncoderBlock(nn.Module):
    """Transformer block: self-attention and an MLP of width 2C, each with pre-norm and residual."""

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
    """Layer norm, average over the tokens, and a linear layer."""

    num_classes: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], train: bool) -> Float[Array, "B classes"]:
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(1)
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))


def vit(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Returns the network: block 0 embeds patches as tokens, the other blocks are the encoder.

    Args:
      width: number of channels per token, a multiple of the number of attention heads.
      num_classes: number of classes.
      dtype: dtype of the computation.

    Raises:
      UserError: `width` is not a multiple of the number of attention heads.
    """
    if width % HEADS:
        raise UserError(
            f"config.model.width={width}: must be a multiple of the {HEADS} attention heads"
        )
    return Network(
        (PatchEmbedding(width, PATCH, dtype), *[EncoderBlock(HEADS, dtype)] * DEPTH),
        Classifier(num_classes, dtype),
    )


register_network("vit", vit)
