"""Pooling. The one place that picks its formulation by platform.

On GPU and TPU the pooling of flax is used; what a CPU does instead, and how much time that saves, stands in `cpu/pooling.py`.
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

    Of equal maxima in one window the first, row by row, gets the gradient.

    Args:
      x: maps of even height and width.
      ops: see `dgl_jax.ops`.

    Raises:
      ValueError: an odd height or width.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"2x2 pooling of a {height}x{width} map: both sizes must be even")
    return _by_platform(
        x,
        ops,
        cpu=on_cpu.max_of_four,
        elsewhere=lambda y: nn.max_pool(y, (2, 2), strides=(2, 2)),
    )


def max_pool_3x3(x: Float[Array, "B H W C"], *, ops: str = "auto") -> Float[Array, "B h w C"]:
    """Takes the maximum of 3x3 windows with stride 2 and one row and column beyond each edge.

    Of equal maxima in one window `reduce_window` gives the gradient to the first and the CPU's formulation shares it.
    Behind a ReLU, where nearly all ties are zeros, both come to the same: its gradient there is 0.

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


def adaptive_avg_pool(
    x: Float[Array, "B H W C"], out_size: tuple[int, int], *, ops: str = "auto"
) -> Float[Array, "B h w C"]:
    """Averages a map of any size down (or up) to `out_size`, as PyTorch's AdaptiveAvgPool2d does.

    Output i of h averages the inputs floor(i H / h) up to, not including, ceil((i + 1) H / h): neighbouring windows
    overlap if h does not divide H. Sums are taken in float32.

    Args:
      x: maps.
      out_size: height and width (h, w) of the result.
      ops: see `dgl_jax.ops`.

    Returns:
      The averages in the type of `x`.
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


def _by_platform(x: Array, ops: str, *, cpu: Pool, elsewhere: Pool) -> Array:
    # Decided when a program is lowered for its devices, whatever the default one: it is compiled with one branch only.
    return (
        elsewhere(x) if only_xla(ops) else jax.lax.platform_dependent(x, cpu=cpu, default=elsewhere)
    )


def _averages(size: int, out: int) -> np.ndarray:
    """Returns the (out, size) matrix whose row i averages the i-th window."""
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
