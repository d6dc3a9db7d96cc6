"""Network that downsamples by convolutions of stride 2, without pooling and batch norm."""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.models import register_network


class Strided(nn.Module):
    """Block of a 3x3 convolution and GELU."""

    features: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        """Returns the features, downsampled by the stride."""
        return nn.gelu(nn.Conv(self.features, (3, 3), self.stride, dtype=self.dtype)(x))


def make(width: int, num_classes: int, dtype: DTypeLike) -> list[nn.Module]:
    """Returns the four blocks of the network."""
    return [
        Strided(width * scale, stride, dtype) for scale, stride in ((1, 1), (2, 2), (2, 1), (4, 2))
    ]


register_network("strided", make)
