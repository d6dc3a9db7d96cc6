"""Pooling with a formulation per platform.

GPU and TPU use the pooling of flax; `cpu/pooling.py` holds the formulations for a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dgl_jax.ops.choice import only_xla
from dgl_jax.ops.cpu import pooling as on_cpu

Pool = Callable[[Array], Array]


def max_pool_2x2(x: Float[Array, "B H W C"], *, ops: str = "auto") -> Float[Array, "B h w C"]:
    """Takes the maximum of each 2x2 window with stride 2, which halves height and width.

    If several values of a window are equal to the maximum, the first one in row-major order
    receives the gradient.

    Args:
      x: maps of even height and width.
      ops: see `dgl_jax.ops`.

    Raises:
      ValueError: the height or the width is odd.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"2x2 pooling of a {height}x{width} map: height and width must be even")
    return _by_platform(
        x,
        ops,
        cpu=on_cpu.max_of_four,
        elsewhere=lambda y: nn.max_pool(y, (2, 2), strides=(2, 2)),
    )


def max_pool_3x3(x: Float[Array, "B H W C"], *, ops: str = "auto") -> Float[Array, "B h w C"]:
    """Takes the maximum of 3x3 windows with stride 2 and a padding of 1 at each edge.

    If several values of a window are equal to the maximum, `reduce_window` gives the gradient to
    the first one, and the CPU formulation splits it among them. After a ReLU both are equivalent:
    nearly all ties are zeros, where the gradient of the ReLU is 0.

    Args:
      x: maps.
      ops: see `dgl_jax.ops`.

    Returns:
      Maps of half the height and width, rounded up.
    """
    return _by_platform(
        x,
        ops,
        cpu=lambda y: on_cpu.max_of_three(on_cpu.max_of_three(y, 1), 2),
        elsewhere=lambda y: nn.max_pool(y, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
    )


def max_pool_windows(
    x: Float[Array, "B H W C"], side: int, *, ops: str = "auto"
) -> Float[Array, "B h w C"]:
    """Takes the maximum of windows of `side` x `side` values that do not overlap.

    Equal maxima get the gradient as in `max_pool_3x3`.

    Args:
      x: maps. Rows and columns that do not fill a window are left out.
      side: height and width of the windows, and their stride.
      ops: see `dgl_jax.ops`.

    Returns:
      Maps of height H / side and width W / side, rounded down.
    """
    return _by_platform(
        _whole_windows(x, side),
        ops,
        cpu=lambda y: on_cpu.windows(y, side, side).max((2, 4)),
        elsewhere=lambda y: nn.max_pool(y, (side, side), strides=(side, side)),
    )


def avg_pool_windows(
    x: Float[Array, "B H W C"], side: int, *, ops: str = "auto"
) -> Float[Array, "B h w C"]:
    """Averages windows of `side` x `side` values; arguments as in `max_pool_windows`."""
    x = _whole_windows(x, side)
    return adaptive_avg_pool(x, (x.shape[1] // side, x.shape[2] // side), ops=ops)


def adaptive_avg_pool(
    x: Float[Array, "B H W C"], out_size: tuple[int, int], *, ops: str = "auto"
) -> Float[Array, "B h w C"]:
    """Averages a map of any size to `out_size`, as PyTorch's AdaptiveAvgPool2d does.

    Output row i averages the input rows from floor(i H / h) to ceil((i + 1) H / h), exclusive, and
    likewise for columns; neighboring windows overlap if h does not divide H. Sums are taken in
    float32.

    Args:
      x: maps.
      out_size: height and width (h, w) of the result; larger than the map is allowed.
      ops: see `dgl_jax.ops`.

    Returns:
      The averages in the dtype of `x`.
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
            ops,
            cpu=lambda z: on_cpu.windows(z, *window).mean((2, 4)),
            elsewhere=lambda z: nn.avg_pool(z, window, strides=window),
        )
    return y.astype(x.dtype)


def _whole_windows(x: Array, side: int) -> Array:
    return x[:, : x.shape[1] // side * side, : x.shape[2] // side * side]


def _by_platform(x: Array, ops: str, *, cpu: Pool, elsewhere: Pool) -> Array:
    # The choice is made when a program is lowered, for the devices of that program (not for the
    # default device), and the program contains only one branch.
    return (
        elsewhere(x) if only_xla(ops) else jax.lax.platform_dependent(x, cpu=cpu, default=elsewhere)
    )


def _averages(size: int, out: int) -> np.ndarray:
    """Returns the matrix [out, size] whose row i averages the i-th window."""
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
