"""The block that networks are lists of, and the layers it shares with the heads.

The layers are functions to be called in the compact method of a linen module, which owns their parameters. They compute
in the given `dtype`; parameters and batch statistics are float32.
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

from dgl_jax.ops.batch_norm import BatchNorm
from dgl_jax.ops.conv import conv_general_dilated
from dgl_jax.ops.pooling import max_pool_2x2

_AXES = ("NHWC", "HWIO", "NHWC")

# Normal with variance 2 / (kernel height x width x features): He et al. 2015, in the backward direction.
KAIMING_FAN_OUT: Initializer = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform_fan_in(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's default for weights and biases of convolutions and Linear layers."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class Conv(nn.Module):
    """Convolution that hands out its bias instead of adding it; parameters as `flax.linen.Conv` has them."""

    features: int
    kernel: int = 3
    stride: int = 1
    bias: bool = True
    kernel_init: Initializer | None = None
    dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w F"], Float[Array, " F"] | None]:
        """The convolution without the bias; and the bias, None where there is none."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        default = uniform_fan_in(self.kernel * self.kernel * x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or default, shape, jnp.float32)
        bias_init = nn.initializers.zeros if self.kernel_init else default
        bias = self.param("bias", bias_init, (self.features,), jnp.float32) if self.bias else None
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        edges = (self.kernel // 2,) * 2
        return conv_general_dilated(x, kernel, (self.stride,) * 2, (edges, edges), dimension_numbers=_AXES), bias


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
) -> Float[Array, "B h w F"]:
    """Convolution with an odd square kernel and zero padding - batch norm - ReLU where asked to: h and w are H / stride and
    W / stride, rounded up.

    `kernel_init` draws the weights, and biases begin at 0; without it both begin as PyTorch's do.
    """
    y, offset = Conv(features, kernel, stride, bias, kernel_init, dtype)(x)
    return batch_norm(y, train, relu=relu, offset=offset, dtype=dtype)


def linear(
    x: Float[Array, "B C"], features: int, *, kernel_init: Initializer | None = None, dtype: DTypeLike
) -> Float[Array, "B F"]:
    """Linear layer with bias; begins as convolutions do."""
    default = uniform_fan_in(x.shape[-1])
    bias_init = nn.initializers.zeros if kernel_init else default
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init or default, bias_init=bias_init)(x)


def batch_norm(
    x: Float[Array, "B *S C"],
    train: bool,
    *,
    relu: bool = False,
    offset: Float[Array, " C"] | None = None,
    dtype: DTypeLike,
) -> Float[Array, "B *S C"]:
    """Batch normalisation of x + offset over all axes but the last, followed by a ReLU where asked to.

    In training the batch's own mean and variance normalise, and the running averages (collection `batch_stats`) move a
    tenth of the way to them; in evaluation the running averages normalise.
    """
    return BatchNorm(dtype=dtype)(x, train, relu=relu, offset=offset)


class ConvBlock(nn.Module):
    """[2x2 max pooling] - convolution - batch norm - ReLU."""

    features: int
    pool: bool = False
    bias: bool = True
    kernel: int = 3
    kernel_init: Initializer | None = None
    dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w F"]:
        """`train` selects the batch's own statistics and updates the running ones. h, w: H, W or, with `pool`, half."""
        if self.pool:
            x = max_pool_2x2(x)
        return conv_norm(
            x,
            train,
            self.features,
            relu=True,
            kernel=self.kernel,
            bias=self.bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
