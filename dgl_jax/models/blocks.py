"""Convolutional block of the networks, and the layers that blocks and heads share.

`conv_norm` and `linear` must be called in a compact method of a linen module, which then owns the
layers that they create. All layers compute in the given `dtype`; parameters and batch statistics
are float32. See `dgl_jax.ops` for `ops`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.ops import BatchNorm, conv_general_dilated, max_pool_2x2

_AXES = ("NHWC", "HWIO", "NHWC")

# Normal with variance 2 / (kernel height x width x features): He et al. 2015, backward variant.
KAIMING_FAN_OUT: Initializer = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform_fan_in(fan_in: int) -> Initializer:
    """Returns PyTorch's default initializer of convolutions and linear layers.

    Weights and biases are uniform in +-1/sqrt(fan_in).
    """
    bound = 1 / math.sqrt(fan_in)

    def init(
        key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class Conv(nn.Module):
    """Convolution with an odd square kernel and zero padding of half its size.

    The parameters have the names and shapes of `flax.linen.Conv`.

    Attributes:
      features: output channels.
      kernel: height and width of the kernel.
      stride: stride in both directions.
      bias: if True, the layer has a bias.
      kernel_init: initializer of the weights, with biases initialized to 0. None initializes both
        as PyTorch does, see `uniform_fan_in`.
      dtype: dtype of the arithmetic.
      ops: see `dgl_jax.ops`.
      pointwise: "dot" computes a 1x1 convolution with stride 1 as a matrix product, which a GPU
        fuses with other operations, unlike a call of its convolution library.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    bias: bool = True
    kernel_init: Initializer | None = None
    dtype: DTypeLike = "float32"
    ops: str = "auto"
    pointwise: str = "conv"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, add_bias: bool = True
    ) -> Float[Array, "B h w F"]:
        """Computes maps of height H / stride and width W / stride, rounded up.

        Args:
          x: maps.
          add_bias: if False, the caller adds the bias, which is the variable `bias` of this module.
        """
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        default = uniform_fan_in(self.kernel * self.kernel * x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or default, shape, jnp.float32)
        bias_init = nn.initializers.zeros if self.kernel_init else default
        bias = self.param("bias", bias_init, (self.features,), jnp.float32) if self.bias else None
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.pointwise == "dot" and self.kernel == self.stride == 1:
            y = x @ kernel[0, 0]
        else:
            edges, strides = (self.kernel // 2,) * 2, (self.stride,) * 2
            y = conv_general_dilated(
                x, kernel, strides, (edges, edges), dimension_numbers=_AXES, ops=self.ops
            )
        return y if bias is None or not add_bias else y + bias.astype(y.dtype)


def conv_norm(
    x: Float[Array, "B H W C"],
    train: bool,
    features: int,
    *,
    relu: bool,
    kernel: int = 3,
    stride: int = 1,
    bias: bool = True,
    kernel_init: Initializer | None = None,
    dtype: DTypeLike,
    ops: str,
    pointwise: str = "conv",
) -> Float[Array, "B h w F"]:
    """Applies a convolution, batch norm and, if `relu`, a ReLU.

    Args:
      x: maps.
      train: see `BatchNorm`.
      features: see `Conv`.
      relu: apply a ReLU to the result.
      kernel: see `Conv`.
      stride: see `Conv`.
      bias: see `Conv`.
      kernel_init: see `Conv`.
      dtype: see `Conv`.
      ops: see `dgl_jax.ops`.
      pointwise: see `Conv`.

    Returns:
      Maps of height H / stride and width W / stride, rounded up.
    """
    conv = Conv(features, kernel, stride, bias, kernel_init, dtype, ops, pointwise)
    y = conv(x, add_bias=False)
    # In training the bias cancels in batch norm, so adding it would waste a pass over the maps.
    return BatchNorm(dtype, ops)(y, train, relu=relu, offset=conv.get_variable("params", "bias"))


def linear(
    x: Float[Array, "B C"],
    features: int,
    *,
    kernel_init: Initializer | None = None,
    dtype: DTypeLike,
) -> Float[Array, "B F"]:
    """Applies a linear layer with bias, initialized as in `Conv`."""
    default = uniform_fan_in(x.shape[-1])
    bias_init = nn.initializers.zeros if kernel_init else default
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init or default, bias_init=bias_init)(
        x
    )


def linear_logits(
    x: Float[Array, "B C"],
    classes: int,
    dtype: DTypeLike,
    logits: str,
    kernel_init: Initializer | None = None,
) -> Float[Array, "B classes"]:
    """Applies the last layer of a head and returns float32, whatever it computes in.

    Args:
      x: features.
      classes: number of classes.
      dtype: dtype of the head's other layers.
      logits: computes in "float32", or in `dtype` if it is "model".
      kernel_init: see `Conv`.
    """
    dtype = dtype if logits == "model" else "float32"
    return linear(x, classes, kernel_init=kernel_init, dtype=dtype).astype("float32")


class ConvBlock(nn.Module):
    """Block of a convolution, batch norm and ReLU, preceded by 2x2 max pooling if `pool`."""

    features: int
    pool: bool = False
    bias: bool = True
    kernel: int = 3
    kernel_init: Initializer | None = None
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w F"]:
        """Computes maps of the same size, or of half the height and width if `pool`."""
        if self.pool:
            x = max_pool_2x2(x, ops=self.ops)
        return conv_norm(
            x,
            train,
            self.features,
            relu=True,
            kernel=self.kernel,
            bias=self.bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            ops=self.ops,
        )
