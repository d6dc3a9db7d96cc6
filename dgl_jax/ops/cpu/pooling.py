"""Pooling as reshapes and slices, for a CPU, where XLA's gradient of `reduce_window` is slow.

maps of 128x32x32x32, gradient of the average             nn.avg_pool                    44 ms
                                                          reshape and mean                2 ms
the same, scale, ReLU and 2x2 maximum with gradients      nn.max_pool                    82 ms
                                                          reshape and maximum            33 ms
                                                          the same, custom gradient      16 ms
maps of 8x112x112x64, one core, gradient of 3x3 maximum   nn.max_pool                   316 ms
                                                          maximum of nine slices        520 ms
                                                          three slices along each axis   86 ms
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def windows(
    x: Float[Array, "B H W C"], height: int, width: int
) -> Float[Array, "B h height w width C"]:
    """Cuts maps into h x w windows that do not overlap, of `height` x `width` values each."""
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // height, height, columns // width, width, channels)


@jax.custom_vjp
def max_of_four(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Takes the maximum of each 2x2 window; the first of equal maxima receives the gradient."""
    return windows(x, 2, 2).max((2, 4))


def _max_of_four_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = max_of_four(x)
    return y, (x, y)


def _max_of_four_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    x, y = saved
    # `taken` marks windows whose maximum was already seen, in row-major order.
    parts, taken, rows = windows(x, 2, 2), jnp.zeros(y.shape, bool), []
    for i in range(2):
        row = []
        for j in range(2):
            largest = parts[:, :, i, :, j] == y
            row.append(jnp.where(largest & ~taken, cotangent, 0))
            taken |= largest
        rows.append(jnp.stack(row, axis=3))
    return (jnp.stack(rows, axis=2).reshape(x.shape),)


max_of_four.defvjp(_max_of_four_forward, _max_of_four_backward)


def max_of_three(x: Array, axis: int) -> Array:
    """Takes the maximum of each even position along an axis and its two neighbors.

    Equal maxima share the gradient.
    """
    edges = [(int(a == axis),) * 2 for a in range(x.ndim)]
    padded, size = jnp.pad(x, edges, constant_values=-jnp.inf), x.shape[axis]
    slices = [jax.lax.slice_in_dim(padded, i, i + size, stride=2, axis=axis) for i in range(3)]
    return jnp.maximum(jnp.maximum(*slices[:2]), slices[2])
