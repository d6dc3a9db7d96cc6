"""Computes 3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) (Lavin and Gray 2016), for a CPU.

The map is cut into overlapping tiles of 6x6, the kernel and each tile are transformed, and 36 matrix products of
transformed tiles with transformed kernels give transformed tiles of 4x4. Rounding errors are about six times those of the
direct sum: 1e-6 of an output's standard deviation (root mean square).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from math import prod

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dgl_jax.ops.cpu import chunks

_OUT, _IN = 4, 6  # side of a tile of the result and of the input
_TILES = 128  # tiles of one chunk, which stay in a core's cache
_CHANNELS = 32
Matrix = Sequence[Sequence[float]]


def _matrices(points: Sequence[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """Returns the transforms of input, kernel and output for these points and infinity (Toom and Cook).

    Each row (of the output's: each column) belongs to a point. Both factors of a product of polynomials are evaluated there, and
    Lagrange's polynomials make the product from its values.
    """

    def from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
        """Returns the coefficients, the constant one first, of the product of all x - root."""
        product = [Fraction(1)]
        for root in roots:
            product = [
                a - root * b for a, b in zip([Fraction(0), *product], [*product, Fraction(0)])
            ]
        return product

    others = [[q for q in points if q != p] for p in points]
    at_input = [[*from_roots(rest), Fraction(0)] for rest in others] + [from_roots(points)]
    at_kernel = [
        [p**j / prod(p - q for q in rest) for j in range(3)] for p, rest in zip(points, others)
    ] + [[0, 0, 1]]
    at_output = [[*(p**i for p in points), int(i == _OUT - 1)] for i in range(_OUT)]
    return tuple(
        tuple(tuple(map(float, row)) for row in matrix)
        for matrix in (at_input, at_kernel, at_output)
    )  # type: ignore[return-value]


# Of the points tried these have the smallest errors, a fifth of those of 0, 1, -1, 2, -2.
_INPUT, _KERNEL, _OUTPUT = _matrices(
    [Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2)]
)


def fits(x: Array, kernel: Array) -> bool:
    """Returns whether this pays for a 3x3 convolution of stride 1 in float32, which takes enough channels and tiles."""
    if min(kernel.shape[2:]) < _CHANNELS or min(x.shape[1:3]) < _OUT:
        return False
    return (
        isinstance(x.shape[0], int) and len(x) * _tiles(x) >= _TILES
    )  # a program for any batch has no number there


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    """Convolves with stride 1, without a flip, with one row and column of zeros beyond each edge."""
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    weights = _both(_KERNEL, kernel, 0).reshape(-1, channels, features)

    def one(x: Array) -> Array:
        tiles = _input_tiles(x)
        products = _product(tiles.reshape(_IN * _IN, -1, channels), weights, 2, 1)
        return _joined(products.reshape(*tiles.shape[:-1], features))[:, :height, :width]

    return chunks.map_chunks(one, _chunk_size(x), x)


def input_gradient(
    kernel: Float[Array, "3 3 C F"], cotangent: Float[Array, "B H W F"]
) -> Float[Array, "B H W C"]:
    """Computes the gradient of `convolve` by its input: the convolution with the kernel turned around."""
    return convolve(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))


def kernel_gradient(
    x: Float[Array, "B H W C"], cotangent: Float[Array, "B H W F"]
) -> Float[Array, "3 3 C F"]:
    """Computes the gradient of `convolve` by its kernel."""
    channels, features = x.shape[-1], cotangent.shape[-1]

    def one(x: Array, cotangent: Array) -> Array:
        tiles = _input_tiles(x).reshape(_IN * _IN, -1, channels)
        products = _product(tiles, _output_tiles(cotangent).reshape(_IN * _IN, -1, features), 1, 1)
        return _both(_transposed(_KERNEL), products.reshape(_IN, _IN, channels, features), 0)

    return chunks.sum_chunks(one, _chunk_size(x), x, cotangent)


def _chunk_size(x: Array) -> int:
    """Returns the smallest number of images that have enough tiles."""
    return chunks.chunk_size(len(x), -(-_TILES // _tiles(x)))


def _tiles(x: Array) -> int:
    return -(-x.shape[1] // _OUT) * -(-x.shape[2] // _OUT)


def _input_tiles(x: Float[Array, "B H W C"]) -> Float[Array, "6 6 B h w C"]:
    height, width = (-(-size // _OUT) for size in x.shape[1:3])
    edges = [
        (0, 0),
        *((1, 1 + _OUT * n - size) for n, size in zip((height, width), x.shape[1:3])),
        (0, 0),
    ]
    padded = jnp.pad(x, edges)
    rows = _stacked(_INPUT, _strided(padded, 1, _IN, height), 0)
    return _stacked(_INPUT, _strided(rows, 3, _IN, width), 1)


def _output_tiles(y: Float[Array, "B H W F"]) -> Float[Array, "6 6 B h w F"]:
    """Computes the adjoint of `_joined`."""
    height, width = (-(-size // _OUT) for size in y.shape[1:3])
    padded = jnp.pad(
        y,
        [(0, 0), *((0, _OUT * n - size) for n, size in zip((height, width), y.shape[1:3])), (0, 0)],
    )
    rows = _stacked(_transposed(_OUTPUT), _strided(padded, 1, _OUT, height), 0)
    return _stacked(_transposed(_OUTPUT), _strided(rows, 3, _OUT, width), 1)


def _joined(tiles: Float[Array, "6 6 B h w F"]) -> Float[Array, "B H W F"]:
    rows = _combined(_OUTPUT, [*tiles])
    parts = [_combined(_OUTPUT, [*row]) for row in rows]
    y = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
    batch, height, _, width, _, features = y.shape
    return y.reshape(batch, height * _OUT, width * _OUT, features)


def _both(matrix: Matrix, x: Array, axis: int) -> Array:
    """Applies the matrix to `axis` and to the one behind it."""
    rows = _stacked(
        matrix, [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])], axis
    )
    return _stacked(
        matrix,
        [lax.index_in_dim(rows, i, axis + 1, keepdims=False) for i in range(x.shape[axis + 1])],
        axis + 1,
    )


def _strided(x: Array, axis: int, count: int, tiles: int) -> list[Array]:
    """Returns places 0, 1, ... of each tile along an axis."""
    return [lax.slice_in_dim(x, i, i + _OUT * (tiles - 1) + 1, _OUT, axis) for i in range(count)]


def _stacked(matrix: Matrix, parts: Sequence[Array], axis: int) -> Array:
    return jnp.stack(_combined(matrix, parts), axis=axis)


def _combined(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """Multiplies the matrix with the parts, leaving out terms that are 0: sums of a few arrays are faster than a 6x6 product."""
    return [
        reduce(jnp.add, (p if c == 1 else c * p for c, p in zip(row, parts, strict=True) if c))
        for row in matrix
    ]


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((0,), (0,))), precision=lax.Precision.HIGHEST
    )
