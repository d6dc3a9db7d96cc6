"""Residual networks for CIFAR and ImageNet (He et al. 2016).

Each residual block is one block of the network, so that a cut never lies inside it. Convolutions
have no bias and are initialized Kaiming-normal (fan out). All batch norms start with scale 1, also
the last one of a residual block.
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.models.blocks import KAIMING_FAN_OUT, ConvBlock, conv_norm
from dgl_jax.models.heads import LinearHead
from dgl_jax.models.network import Network
from dgl_jax.ops import max_pool_3x3

# Residual blocks per stage of the ImageNet networks, by depth.
_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

_conv_norm = partial(conv_norm, bias=False, kernel_init=KAIMING_FAN_OUT)


class Stem(nn.Module):
    """Stem of the ImageNet networks.

    The layers are a 7x7 convolution with stride 2, batch norm, ReLU and 3x3 max pooling with
    stride 2.
    """

    features: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w F"]:
        """Computes maps of a quarter of the height and width, rounded up."""
        x = _conv_norm(
            x, train, self.features, relu=True, kernel=7, stride=2, dtype=self.dtype, ops=self.ops
        )
        return max_pool_3x3(x, ops=self.ops)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, the first one with the stride.

    If the shape changes, the shortcut is a projection by a 1x1 convolution and batch norm. With
    `padded` it has no parameters: it takes every `stride`-th row and column and appends channels of
    zeros (or drops channels, if the block has fewer than its input).
    """

    features: int
    stride: int = 1
    padded: bool = False
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w F"]:
        """Returns maps whose h and w are H / stride and W / stride, rounded up."""
        y = _conv_norm(
            x, train, self.features, relu=True, stride=self.stride, dtype=self.dtype, ops=self.ops
        )
        y = _conv_norm(y, train, self.features, relu=False, dtype=self.dtype, ops=self.ops)
        _sow_residual(self, x, y)
        if self.padded:
            return nn.relu(y + _padded(x, y.shape[-1], self.stride))
        return nn.relu(y + _projected(x, y.shape[-1], self.stride, train, self.dtype, self.ops))


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 (with the stride) and a 1x1 convolution to 4 x `features`.

    If the shape changes, the shortcut is a projection by a 1x1 convolution and batch norm.
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w 4*F"]:
        """Returns maps whose h and w are H / stride and W / stride, rounded up."""
        y = _conv_norm(x, train, self.features, relu=True, kernel=1, dtype=self.dtype, ops=self.ops)
        y = _conv_norm(
            y, train, self.features, relu=True, stride=self.stride, dtype=self.dtype, ops=self.ops
        )
        y = _conv_norm(
            y, train, 4 * self.features, relu=False, kernel=1, dtype=self.dtype, ops=self.ops
        )
        _sow_residual(self, x, y)
        return nn.relu(y + _projected(x, y.shape[-1], self.stride, train, self.dtype, self.ops))


def cifar_resnet(depth: int, width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates the network for small images.

    It has a 3x3 convolution and three stages of basic blocks with padded shortcuts.

    Args:
      depth: 6 n + 2 for n blocks per stage; 20, 32, 44, 56 and 110 are published.
      width: channels of the first stage, 16 in the paper; they double with each stage.
      num_classes: number of classes.
      dtype: dtype of the arithmetic.
    """
    stages = ((depth - 2) // 6,) * 3
    return Network(
        (
            _small_stem(width, dtype),
            *_stages(partial(BasicBlock, padded=True), stages, width, dtype),
        ),
        LinearHead(num_classes, dtype=dtype),
    )


def imagenet_resnet(depth: int, width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates the network for ImageNet.

    Args:
      depth: 18 or 34 for basic blocks; 50, 101 or 152 for bottlenecks.
      width: channels of the stem, 64 in the paper; (inner) channels double with each stage.
      num_classes: number of classes.
      dtype: dtype of the arithmetic.
    """
    make, stages = (
        (BasicBlock, _BASIC[depth]) if depth in _BASIC else (Bottleneck, _BOTTLENECK[depth])
    )
    return Network(
        (Stem(width, dtype=dtype), *_stages(make, stages, width, dtype)),
        LinearHead(num_classes, dtype=dtype),
    )


def resnet18_cifar(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates ResNet-18 for 32x32 images.

    A 3x3 convolution without stride or pooling replaces the stem.
    """
    blocks = (_small_stem(width, dtype), *_stages(BasicBlock, _BASIC[18], width, dtype))
    return Network(blocks, LinearHead(num_classes, dtype=dtype))


def _small_stem(width: int, dtype: DTypeLike) -> nn.Module:
    return ConvBlock(width, bias=False, kernel_init=KAIMING_FAN_OUT, dtype=dtype)


def _stages(make, counts: tuple[int, ...], width: int, dtype: DTypeLike) -> list[nn.Module]:
    """Creates the residual blocks; each stage doubles the channels and halves height and width."""
    return [
        make(width * 2**stage, stride=2 if stage > 0 and n == 0 else 1, dtype=dtype)
        for stage, count in enumerate(counts)
        for n in range(count)
    ]


def _projected(
    x: Array, features: int, stride: int, train: bool, dtype: DTypeLike, ops: str
) -> Array:
    if x.shape[-1] == features and stride == 1:
        return x
    return _conv_norm(x, train, features, relu=False, kernel=1, stride=stride, dtype=dtype, ops=ops)


def _padded(x: Array, features: int, stride: int) -> Array:
    x = x[:, ::stride, ::stride, :features]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def _sow_residual(block: nn.Module, x: Array, y: Array) -> None:
    """Sows what a block adds to its inputs, if it changes no shape, for objectives to read."""
    if x.shape == y.shape:
        block.sow("intermediates", "residual", y)
