"""The block that networks are lists of, and the layers it shares with the heads.

`conv_norm` and `linear` are called in the compact method of a linen module, which holds the layers that they make. All compute
in the given `dtype`; parameters and batch statistics are float32. `ops` is explained in `dgl_jax.ops`.
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

# Normal with variance 2 / (kernel height x width x features): He et al. 2015, in the backward direction.
KAIMING_FAN_OUT: Initializer = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform_fan_in(fan_in: int) -> Initializer:
    """Makes the initializer uniform in +-1/sqrt(fan_in), PyTorch's for weights and biases of convolutions and Linear layers."""
    bound = 1 / math.sqrt(fan_in)

    def init(
        key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class Conv(nn.Module):
    """Convolves with an odd square kernel and zero padding; parameters as `flax.linen.Conv` has them.

    Attributes:
      features: channels of the output.
      kernel: height and width of the kernel.
      stride: in both directions.
      bias: whether there is one.
      kernel_init: draws the weights, and biases begin at 0; without it both begin as PyTorch's do.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    bias: bool = True
    kernel_init: Initializer | None = None
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, add_bias: bool = True
    ) -> Float[Array, "B h w F"]:
        """Returns the outputs, h and w being H / stride and W / stride, rounded up.

        Args:
          x: maps.
          add_bias: false leaves the addition to the caller, who finds the bias in the variable `bias`.
        """
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        default = uniform_fan_in(self.kernel * self.kernel * x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or default, shape, jnp.float32)
        bias_init = nn.initializers.zeros if self.kernel_init else default
        bias = self.param("bias", bias_init, (self.features,), jnp.float32) if self.bias else None
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
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
) -> Float[Array, "B h w F"]:
    """Applies a convolution, batch norm and, if `relu`, a ReLU.

    Args:
      x: maps.
      train: see `BatchNorm`.
      features, kernel, stride, bias, kernel_init: see `Conv`.
      relu: apply a ReLU at the end.

    Returns:
      Maps whose h and w are H / stride and W / stride, rounded up.
    """
    conv = Conv(features, kernel, stride, bias, kernel_init, dtype, ops)
    y = conv(x, add_bias=False)
    # Batch norm takes the bias, as it cancels in training: to add it would be a pass over the maps for nothing.
    return BatchNorm(dtype, ops)(y, train, relu=relu, offset=conv.get_variable("params", "bias"))


def linear(
    x: Float[Array, "B C"],
    features: int,
    *,
    kernel_init: Initializer | None = None,
    dtype: DTypeLike,
) -> Float[Array, "B F"]:
    """Applies a Linear layer with bias, which begins as `Conv` does."""
    default = uniform_fan_in(x.shape[-1])
    bias_init = nn.initializers.zeros if kernel_init else default
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init or default, bias_init=bias_init)(
        x
    )


class ConvBlock(nn.Module):
    """Applies [2x2 max pooling,] convolution, batch norm and ReLU."""

    features: int
    pool: bool = False
    bias: bool = True
    kernel: int = 3
    kernel_init: Initializer | None = None
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w F"]:
        """Returns maps of the same size or, with `pool`, of half the height and width; `train` is explained in `BatchNorm`."""
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
