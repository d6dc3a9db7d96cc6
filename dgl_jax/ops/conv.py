"""Convolution with a formulation per platform.

GPU and TPU use XLA's convolution. On a CPU three formulations are faster than XLA's:

- Winograd for 3x3 kernels (`cpu/winograd.py`). For 8x8 maps, 128 input and output channels and a
  batch of 128, the outputs take 10 ms instead of 18, and the gradient of the kernel, which XLA
  computes as a convolution that sums over the whole batch, 11 ms instead of more than 60
  (benchmarks/cpu_reference).
- One matrix product for the gradient of 3x3 kernels with few input channels, and for the outputs
  if the output channels are few too (`cpu/im2col.py`).
- XLA's gradient over chunks of the batch for all other kernels, if the batch is larger than the
  caches: on 32x32 maps of 16 channels it takes a ninth of the time. Smaller batches are not cut,
  which is as fast and compiles in a tenth of the time (benchmarks/cpu_reference).
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from dgl_jax.ops.choice import only_xla
from dgl_jax.ops.cpu import chunks, im2col, winograd

_AXES = ("NHWC", "HWIO", "NHWC")
UNCUT_BYTES = 2**20  # batches of maps up to this size are not cut into chunks
CHUNK_BYTES = 2**18  # size of a chunk of larger ones, unless it holds fewer than `CHUNK` images
CHUNK = 8
_SUM_DTYPE = "float32"  # dtype of the sum over chunks for kernels of every dtype


def conv_general_dilated(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "I J c F"],
    strides: Any,
    padding: Any,
    *,
    ops: str = "auto",
    **options: Any,
) -> Float[Array, "B h w F"]:
    """Convolves as `lax.conv_general_dilated` does.

    Args:
      x: maps; the first axis is the batch. The other axes are [H, W, C] by default and follow
        `dimension_numbers` otherwise.
      kernel: weights.
      strides: as for `lax.conv_general_dilated`.
      padding: as for `lax.conv_general_dilated`.
      ops: see `dgl_jax.ops`.
      **options: further arguments of `lax.conv_general_dilated`.

    Returns:
      The outputs, without a bias.
    """

    def library(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    if only_xla(ops):
        return library(x, kernel)
    plain = _is_plain_3x3(x, kernel, strides, padding, **options)
    use_winograd, use_im2col = (
        plain and formulation.fits(x, kernel) for formulation in (winograd, im2col)
    )
    use_im2col_outputs = plain and im2col.fits_outputs(x, kernel)

    def x_gradient(kernel: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda x: library(x, kernel), x)(cotangent)[0]

    def kernel_gradient(x: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda kernel: library(x, kernel), kernel)(cotangent)[0]

    def in_chunks(x: Array, cotangent: Array) -> Array:
        size = images_per_chunk(x, cotangent)
        parts = [[chunks.chunk(a, size, i) for a in (x, cotangent)] for i in range(len(x) // size)]
        return reduce(
            jnp.add, (kernel_gradient(*part).astype(_SUM_DTYPE) for part in parts)
        ).astype(kernel.dtype)

    def outputs(x: Array, kernel: Array) -> Array:
        without_winograd = im2col.convolve if use_im2col_outputs else library
        fast = winograd.convolve if use_winograd else without_winograd
        return _by_platform(x, kernel, cpu=fast, elsewhere=library)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return outputs(x, kernel), (x, kernel)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        x, kernel = saved
        # The gradient of a 1x1 kernel is one matrix product already.
        direct = kernel_gradient if kernel.shape[:2] == (1, 1) else in_chunks
        return (
            _by_platform(
                kernel,
                cotangent,
                cpu=winograd.input_gradient if use_winograd else x_gradient,
                elsewhere=x_gradient,
            ),
            _by_platform(
                x,
                cotangent,
                cpu=winograd.kernel_gradient
                if use_winograd
                else im2col.kernel_gradient
                if use_im2col
                else direct,
                elsewhere=kernel_gradient,
            ),
        )

    convolve = jax.custom_vjp(outputs)
    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


def images_per_chunk(*maps: Shaped[Array, "B ..."]) -> int:
    """Returns how many images of a batch enter one part of the gradient of a kernel.

    Args:
      maps: inputs and gradients of the outputs, or their shapes and dtypes.
    """
    batch, size = maps[0].shape[0], max(x.size * x.dtype.itemsize for x in maps)
    if size <= UNCUT_BYTES:
        return batch
    return chunks.chunk_size(batch, max(CHUNK, CHUNK_BYTES * batch // size))


def _by_platform(*args: Array, cpu: Any, elsewhere: Any) -> Array:
    # The choice is made when a program is lowered, for the devices of that program (not for the
    # default device), and the program contains only one branch.
    return (
        elsewhere(*args)
        if cpu is elsewhere
        else lax.platform_dependent(*args, cpu=cpu, default=elsewhere)
    )


def _is_plain_3x3(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Returns True for a 3x3 convolution in float32 that keeps the height and width of the map."""
    plain = all(
        options.get(name) in (None, 1, (1, 1))
        for name in ("lhs_dilation", "rhs_dilation", "feature_group_count")
    )
    axes, plain_axes = (
        lax.conv_dimension_numbers(x.shape, kernel.shape, d)
        for d in (options.get("dimension_numbers"), _AXES)
    )
    same = padding == "SAME" or (
        not isinstance(padding, str) and [tuple(p) for p in padding] == [(1, 1), (1, 1)]
    )
    return (
        (plain and axes == plain_axes and same and kernel.shape[:2] == (3, 3))
        and tuple(strides) == (1, 1)
        and x.dtype == kernel.dtype == jnp.float32
    )
