"""Convolution whose weight gradient is fast on the CPU too. The one place that picks its formulation by platform.

XLA computes the gradient of the kernel as a convolution that sums over the whole batch. On the CPU that takes about 80 ms for 3x3
kernels, 16x16 maps, 64 to 64 channels and a batch of 128, where the same sum over parts of eight images takes 24 and nine
matrix products of shifted maps 80 (benchmarks/cpu_reference). On GPU and TPU the library's is used.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

PART = 8  # images, or the next larger number that divides the batch
_SUM = "float32"  # what the parts are summed in, whatever the arithmetic


def conv_general_dilated(
    x: Float[Array, "B H W C"], kernel: Float[Array, "I J c F"], strides: Any, padding: Any, **options: Any
) -> Float[Array, "B h w F"]:
    """As `lax.conv_general_dilated` with examples along the first axis; gradients are of first order, in reverse mode only."""

    def library(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return library(x, kernel), (x, kernel)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        x, kernel = saved

        def whole(x: Array, cotangent: Array) -> Array:
            return jax.linear_transpose(lambda kernel: library(x, kernel), kernel)(cotangent)[0]

        def in_parts(x: Array, cotangent: Array) -> Array:
            parts = zip(_parts(x), _parts(cotangent), strict=True)
            return reduce(jnp.add, (whole(*part).astype(_SUM) for part in parts)).astype(kernel.dtype)

        (of_x,) = jax.linear_transpose(lambda x: library(x, kernel), x)(cotangent)
        # A 1x1 kernel's gradient is one matrix product.
        cpu = whole if kernel.shape[:2] == (1, 1) else in_parts
        # Decided when a program is lowered for its devices, whatever the default one: it is compiled with one branch only.
        return of_x, lax.platform_dependent(x, cotangent, cpu=cpu, default=whole)

    convolve = jax.custom_vjp(library)
    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


def _parts(x: Array) -> list[Array]:
    """A batch in equal parts. Each takes images from all over the batch: where that is split among devices, so is each part."""
    size = next((n for n in range(PART, len(x)) if len(x) % n == 0), len(x))
    count = len(x) // size
    grouped = x.reshape(size, count, *x.shape[1:])
    return [grouped[:, k] for k in range(count)]
