"""Pooling. The one place that picks a formulation by platform.

On the CPU XLA's gradient of `reduce_window` is slow: on 128x32x32x32 that of `nn.avg_pool` took 44 ms where a reshape
and a mean take 2. Behind a scale and a ReLU `nn.max_pool` and the gradients of all three took 82 ms, a reshape and a maximum 33,
the same with a gradient of its own 16. For overlapping
3x3 windows (8x112x112x64, on one core) the gradient of `nn.max_pool` took 316 ms, that of a maximum of nine slices 520, and
of three slices along one axis and then the other 86. On GPU and TPU the library's pooling is used.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

Pool = Callable[[Array], Array]


def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum of each 2x2 window, stride 2: height and width are halved.

    Of equal maxima in one window the first, row by row, gets the gradient.

    Raises:
      ValueError: an odd height or width.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"2x2 pooling of a {height}x{width} map: both sizes must be even")
    return _by_platform(
        x,
        cpu=_max_of_four,
        elsewhere=lambda y: nn.max_pool(y, (2, 2), strides=(2, 2)),
    )


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum of 3x3 windows, stride 2, one row and column beyond each edge: height and width are halved, rounded up.

    Of equal maxima in one window `reduce_window` gives the gradient to the first and the CPU's formulation shares it.
    Behind a ReLU, where nearly all ties are zeros, both come to the same: its gradient there is 0.
    """
    return _by_platform(
        x,
        cpu=lambda y: _max_of_three(_max_of_three(y, 1), 2),
        elsewhere=lambda y: nn.max_pool(y, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
    )


def adaptive_avg_pool(x: Float[Array, "B H W C"], out_size: tuple[int, int]) -> Float[Array, "B h w C"]:
    """Averages a map of any size down (or up) to `out_size` = (h, w), as PyTorch's AdaptiveAvgPool2d does.

    Output i of h averages the inputs floor(i H / h) up to, not including, ceil((i + 1) H / h): neighbouring windows
    overlap where h does not divide H. Sums are taken in float32; the result has the type of `x`.
    """
    (height, width), (h, w) = x.shape[1:3], out_size
    if (height, width) == (h, w):
        return x
    y = x.astype(jnp.float32)
    if height % h or width % w:
        rows, columns = _averages(height, h), _averages(width, w)
        y = jnp.einsum("bhwc,ih,jw->bijc", y, rows, columns, precision=jax.lax.Precision.HIGHEST)
    else:
        window = (height // h, width // w)
        y = _by_platform(
            y,
            cpu=lambda z: _windows(z, *window).mean((2, 4)),
            elsewhere=lambda z: nn.avg_pool(z, window, strides=window),
        )
    return y.astype(x.dtype)


def _by_platform(x: Array, *, cpu: Pool, elsewhere: Pool) -> Array:
    # Decided when a program is lowered for its devices, whatever the default one: it is compiled with one branch only.
    return jax.lax.platform_dependent(x, cpu=cpu, default=elsewhere)


def _windows(x: Array, height: int, width: int) -> Array:
    """(B, H, W, C) as (B, rows of windows, height, columns of windows, width, C)."""
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // height, height, columns // width, width, channels)


@jax.custom_vjp
def _max_of_four(x: Array) -> Array:
    return _windows(x, 2, 2).max((2, 4))


def _max_of_four_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _max_of_four(x)
    return y, (x, y)


def _max_of_four_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    x, y = saved
    windows, taken, rows = _windows(x, 2, 2), jnp.zeros(y.shape, bool), []
    for i in range(2):
        columns = []
        for j in range(2):
            largest = windows[:, :, i, :, j] == y
            columns.append(jnp.where(largest & ~taken, cotangent, 0))
            taken |= largest
        rows.append(jnp.stack(columns, axis=3))
    return (jnp.stack(rows, axis=2).reshape(x.shape),)


_max_of_four.defvjp(_max_of_four_forward, _max_of_four_backward)


def _max_of_three(x: Array, axis: int) -> Array:
    """Maximum of each even place along an axis and its neighbours."""
    edges = [(int(a == axis),) * 2 for a in range(x.ndim)]
    padded, size = jnp.pad(x, edges, constant_values=-jnp.inf), x.shape[axis]
    slices = [jax.lax.slice_in_dim(padded, i, i + size, stride=2, axis=axis) for i in range(3)]
    return jnp.maximum(jnp.maximum(*slices[:2]), slices[2])


def _averages(size: int, out: int) -> np.ndarray:
    """The (out, size) matrix whose row i averages the i-th window."""
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
