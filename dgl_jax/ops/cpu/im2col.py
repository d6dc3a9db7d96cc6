"""3x3 convolutions with few input channels as one matrix product (im2col), for a CPU.

A row of the left matrix holds the 3x4 pixels that a pair of neighboring outputs in a line reads:

    . . . .        the left output reads columns 0 to 2,
    . L R .        the right output reads columns 1 to 3
    . . . .

This copies two thirds of the values that a row of 3x3 pixels per output would, and both matrices
are wide enough to be multiplied fast. Typical use is the first convolution of a network.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dgl_jax.ops.cpu import chunks

_CHANNELS = 4  # with more input channels, copying the pixels costs more than it saves
# Outputs are faster than XLA's (5 ms instead of 12) up to this number of output channels. The
# gradient of the kernel is faster for more channels too (15 ms instead of 60).
_FEATURES = 32
_PAIRS = 4096  # pairs of neighboring outputs in one chunk of that gradient


def fits(x: Array, kernel: Array) -> bool:
    """Returns True if `kernel_gradient` is the fastest for a 3x3 convolution of stride 1."""
    return kernel.shape[2] <= _CHANNELS <= kernel.shape[3] and x.shape[2] % 2 == 0


def fits_outputs(x: Array, kernel: Array) -> bool:
    """Returns True if `convolve` is the fastest formulation of the outputs too."""
    return fits(x, kernel) and kernel.shape[3] <= _FEATURES


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    """Computes the convolution (no flip) with stride 1 and a zero padding of 1; W must be even."""
    y = lax.dot_general(
        _im2col(x), _pair_kernel(kernel), (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    return y.reshape(*x.shape[:3], -1)


def kernel_gradient(
    x: Float[Array, "B H W C"], cotangent: Float[Array, "B H W F"]
) -> Float[Array, "3 3 C F"]:
    """Computes the gradient of `convolve` with respect to its kernel."""
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
    """Gathers the 3x4 pixels that each pair of neighboring outputs reads."""
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.stack([padded[:, i : i + height] for i in range(3)], axis=2)
    pixels = jnp.stack([rows[:, :, :, j : j + width - 1 : 2] for j in range(4)], axis=3)
    return pixels.transpose(0, 1, 4, 2, 3, 5).reshape(-1, 12 * channels)


def _pair_kernel(kernel: Float[Array, "3 3 C F"]) -> Float[Array, "12*C 2*F"]:
    """Pads the kernel to 3x4 for the left and for the right output of a pair, side by side."""
    pair = [jnp.pad(kernel, ((0, 0), (j, 1 - j), (0, 0), (0, 0))) for j in range(2)]
    return jnp.stack(pair, axis=3).reshape(-1, 2 * kernel.shape[-1])
