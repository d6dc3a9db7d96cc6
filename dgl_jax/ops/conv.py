"""Convolution that is fast on the CPU too. The one place that picks its formulation by platform.

On GPU and TPU the library's is used. On the CPU, XLA's 3x3 convolution of 8x8 maps, 128 to 128 channels and a batch of 128 takes
18 ms, `winograd.py` 10; and their weight gradients, which XLA computes as a convolution that sums over the whole batch, more than
60, and 11 (benchmarks/cpu_reference). Of few channels that gradient is one matrix product, and the outputs sometimes
(`im2col.py`). Where neither fits, it is the library's over parts of eight images.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dgl_jax.ops.cpu import chunks, im2col, winograd

_AXES = ("NHWC", "HWIO", "NHWC")
PART = 8  # images, or the next larger number that divides the batch
_SUM = "float32"  # what the parts are summed in, whatever the arithmetic


def conv_general_dilated(
    x: Float[Array, "B H W C"], kernel: Float[Array, "I J c F"], strides: Any, padding: Any, **options: Any
) -> Float[Array, "B h w F"]:
    """As `lax.conv_general_dilated` with examples along the first axis; gradients are of first order, in reverse mode only."""
    plain = _is_plain_3x3(x, kernel, strides, padding, **options)
    transformed, few = (plain and way.fits(x, kernel) for way in (winograd, im2col))
    few_outputs = plain and im2col.fits_outputs(x, kernel)

    def library(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def of_x(kernel: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda x: library(x, kernel), x)(cotangent)[0]

    def of_kernel(x: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda kernel: library(x, kernel), kernel)(cotangent)[0]

    def in_parts(x: Array, cotangent: Array) -> Array:
        size = chunks.images(len(x), PART)
        parts = [[chunks.part(a, size, i) for a in (x, cotangent)] for i in range(len(x) // size)]
        return reduce(jnp.add, (of_kernel(*part).astype(_SUM) for part in parts)).astype(kernel.dtype)

    def outputs(x: Array, kernel: Array) -> Array:
        fast = winograd.convolve if transformed else im2col.convolve if few_outputs else library
        return _by_platform(x, kernel, cpu=fast, elsewhere=library)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return outputs(x, kernel), (x, kernel)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        x, kernel = saved
        own = of_kernel if kernel.shape[:2] == (1, 1) else in_parts  # a 1x1 kernel's gradient is one matrix product
        return (
            _by_platform(kernel, cotangent, cpu=winograd.input_gradient if transformed else of_x, elsewhere=of_x),
            _by_platform(
                x,
                cotangent,
                cpu=winograd.kernel_gradient if transformed else im2col.kernel_gradient if few else own,
                elsewhere=of_kernel,
            ),
        )

    convolve = jax.custom_vjp(outputs)
    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


def _by_platform(*args: Array, cpu: Any, elsewhere: Any) -> Array:
    # Decided when a program is lowered for its devices, whatever the default one: it is compiled with one branch only.
    return elsewhere(*args) if cpu is elsewhere else lax.platform_dependent(*args, cpu=cpu, default=elsewhere)


def _is_plain_3x3(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Whether these arguments of `lax.conv_general_dilated` are of a 3x3 convolution in float32 that keeps the map's size."""
    plain = all(options.get(name) in (None, 1, (1, 1)) for name in ("lhs_dilation", "rhs_dilation", "feature_group_count"))
    axes, own = (lax.conv_dimension_numbers(x.shape, kernel.shape, d) for d in (options.get("dimension_numbers"), _AXES))
    same = padding == "SAME" or (not isinstance(padding, str) and [tuple(p) for p in padding] == [(1, 1), (1, 1)])
    return (
        (plain and axes == own and same and kernel.shape[:2] == (3, 3))
        and tuple(strides) == (1, 1)
        and x.dtype == kernel.dtype == jnp.float32
    )
