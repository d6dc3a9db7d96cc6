"""Computes 3x3 convolutions of few channels, such as a network's first, as one matrix product (im2col), for a CPU.

A row of the left matrix holds the 3x4 pixels that two neighbouring outputs of a line read. With three channels that copies two
thirds of what a row of 3x3 pixels for each output would, and both matrices are wide enough to multiply fast.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dgl_jax.ops.cpu import chunks

_CHANNELS = 4  # more, and a matrix of pixels costs more than it saves
_FEATURES = 32  # up to here outputs are faster than the library's (5 ms, 12); the kernel's gradient is for more, too (15, 60)
_PAIRS = 4096  # of neighbouring outputs in one chunk of that gradient


def fits(x: Array, kernel: Array) -> bool:
    """Returns whether `kernel_gradient` pays for a 3x3 convolution of stride 1 in float32."""
    return kernel.shape[2] <= _CHANNELS <= kernel.shape[3] and x.shape[2] % 2 == 0


def fits_outputs(x: Array, kernel: Array) -> bool:
    """Returns whether `convolve` pays as well."""
    return fits(x, kernel) and kernel.shape[3] <= _FEATURES


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    """Convolves with stride 1, without a flip, with one row and column of zeros beyond each edge; W is even."""
    y = lax.dot_general(
        _im2col(x), _pair_kernel(kernel), (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    return y.reshape(*x.shape[:3], -1)


def kernel_gradient(
    x: Float[Array, "B H W C"], cotangent: Float[Array, "B H W F"]
) -> Float[Array, "3 3 C F"]:
    """Computes the gradient of `convolve` by its kernel."""
    channels, features = x.shape[-1], cotangent.shape[-1]

    def one(x: Array, cotangent: Array) -> Array:
        pairs = cotangent.reshape(-1, 2 * features)
        return lax.dot_general(
            _im2col(x), pairs, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
        )

    total = chunks.sum_chunks(
        one, chunks.chunk_size(len(x), 2 * _PAIRS // (x.shape[1] * x.shape[2])), x, cotangent
    )
    kernel = jax.ShapeDtypeStruct((3, 3, channels, features), total.dtype)
    return jax.linear_transpose(_pair_kernel, kernel)(total)[0]


def _im2col(x: Float[Array, "B H W C"]) -> Float[Array, "pairs 12*C"]:
    """Gathers the 3x4 pixels that each pair of neighbouring outputs reads."""
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.stack([padded[:, i : i + height] for i in range(3)], axis=2)
    pixels = jnp.stack([rows[:, :, :, j : j + width - 1 : 2] for j in range(4)], axis=3)
    return pixels.transpose(0, 1, 4, 2, 3, 5).reshape(-1, 12 * channels)


def _pair_kernel(kernel: Float[Array, "3 3 C F"]) -> Float[Array, "12*C 2*F"]:
    """Lays out the kernel for the left and the right output of a pair, with zeros for the pixels that only the other one reads."""
    both = [jnp.pad(kernel, ((0, 0), (j, 1 - j), (0, 0), (0, 0))) for j in range(2)]
    return jnp.stack(both, axis=3).reshape(-1, 2 * kernel.shape[-1])
