"""Pooling as reshapes and slices, for a CPU.

XLA's gradient of `reduce_window` is slow there: on 128x32x32x32 that of `nn.avg_pool` took 44 ms, of a reshape and a mean 2. Behind
a scale and a ReLU `nn.max_pool` and the gradients of all three took 82 ms, a reshape and a maximum 33, the same with a custom
gradient 16. For overlapping 3x3 windows (8x112x112x64, on one core) the gradient of `nn.max_pool` took 316 ms, that of a
maximum of nine slices 520, and of three slices along one axis and then the other 86.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def windows(
    x: Float[Array, "B H W C"], height: int, width: int
) -> Float[Array, "B h height w width C"]:
    """Cuts maps into windows that do not overlap: h rows of w windows."""
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // height, height, columns // width, width, channels)


@jax.custom_vjp
def max_of_four(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Takes the maximum of each 2x2 window; the first of equal ones, row by row, gets the gradient."""
    return windows(x, 2, 2).max((2, 4))


def _max_of_four_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = max_of_four(x)
    return y, (x, y)


def _max_of_four_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    x, y = saved
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
    """Takes the maximum of each even place along an axis and its two neighbours; the gradient is shared among equal ones."""
    edges = [(int(a == axis),) * 2 for a in range(x.ndim)]
    padded, size = jnp.pad(x, edges, constant_values=-jnp.inf), x.shape[axis]
    slices = [jax.lax.slice_in_dim(padded, i, i + size, stride=2, axis=axis) for i in range(3)]
    return jnp.maximum(jnp.maximum(*slices[:2]), slices[2])
