"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), for a CPU.

See Lavin and Gray 2016. The map is cut into overlapping tiles of 6x6, the kernel and each tile are
transformed, and 36 matrix products of transformed tiles with transformed kernels yield the
transforms of the 4x4 output tiles:

    x        -> tiles 6x6 -> _INPUT  -\
                                       * (36 matrix products) -> _OUTPUT -> tiles 4x4 -> y
    kernel                -> _KERNEL -/

Rounding errors are about six times as large as in the direct sum: 1e-6 (root mean square) of the
standard deviation of an output.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from math import prod

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dgl_jax.ops.cpu import chunks

_OUT, _IN = 4, 6  # side length of an output tile and of an input tile
_TILES = 128  # tiles per chunk; they fit into a core's cache
_CHANNELS = 32  # smallest number of input and output channels for which Winograd is faster
Matrix = Sequence[Sequence[float]]


def _matrices(points: Sequence[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """Returns the Toom-Cook transforms of input, kernel and output for `points` and infinity.

    Each row of the input and kernel transforms, and each column of the output transform, belongs to
    a point. The method evaluates two polynomials at the points, multiplies the values, and
    interpolates the product with Lagrange polynomials; a convolution is the transpose of that.
    """

    def from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
        """Returns the coefficients of the product of all (x - root), starting with the constant."""
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


# These points have the smallest rounding errors of all tried, a fifth of the errors of the usual
# points 0, 1, -1, 2, -2.
_INPUT, _KERNEL, _OUTPUT = _matrices(
    [Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2)]
)


def fits(x: Array, kernel: Array) -> bool:
    """Returns True if there are enough channels and tiles for Winograd to be the fastest."""
    if min(kernel.shape[2:]) < _CHANNELS or min(x.shape[1:3]) < _OUT:
        return False
    # The batch size of a program exported for any batch is symbolic, not an integer.
    return isinstance(x.shape[0], int) and len(x) * _tiles(x) >= _TILES


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    """Computes the convolution (no flip) with stride 1 and a zero padding of 1."""
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    weights = _transform_both(_KERNEL, kernel, 0).reshape(-1, channels, features)

    def one(x: Array) -> Array:
        tiles = _input_tiles(x)
        products = _product(tiles.reshape(_IN * _IN, -1, channels), weights, 2, 1)
        return _join_tiles(products.reshape(*tiles.shape[:-1], features))[:, :height, :width]

    return chunks.map_chunks(one, _chunk_size(x), x)


def input_gradient(
    kernel: Float[Array, "3 3 C F"], cotangent: Float[Array, "B H W F"]
) -> Float[Array, "B H W C"]:
    """Computes the gradient of `convolve` with respect to its input.

    It is the convolution with the kernel rotated by 180 degrees and its channels swapped.
    """
    return convolve(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))


def kernel_gradient(
    x: Float[Array, "B H W C"], cotangent: Float[Array, "B H W F"]
) -> Float[Array, "3 3 C F"]:
    """Computes the gradient of `convolve` with respect to its kernel."""
    channels, features = x.shape[-1], cotangent.shape[-1]

    def one(x: Array, cotangent: Array) -> Array:
        tiles = _input_tiles(x).reshape(_IN * _IN, -1, channels)
        products = _product(tiles, _output_tiles(cotangent).reshape(_IN * _IN, -1, features), 1, 1)
        products = products.reshape(_IN, _IN, channels, features)
        return _transform_both(_transposed(_KERNEL), products, 0)

    return chunks.sum_chunks(one, _chunk_size(x), x, cotangent)


def _chunk_size(x: Array) -> int:
    """Returns the images per chunk: the fewest that have `_TILES` tiles."""
    return chunks.chunk_size(len(x), -(-_TILES // _tiles(x)))


def _tiles(x: Array) -> int:
    return -(-x.shape[1] // _OUT) * -(-x.shape[2] // _OUT)


def _input_tiles(x: Float[Array, "B H W C"]) -> Float[Array, "6 6 B h w C"]:
    """Cuts maps into overlapping 6x6 tiles and transforms them."""
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
    """Cuts cotangents into 4x4 tiles and transforms them: the adjoint of `_join_tiles`."""
    height, width = (-(-size // _OUT) for size in y.shape[1:3])
    padded = jnp.pad(
        y,
        [(0, 0), *((0, _OUT * n - size) for n, size in zip((height, width), y.shape[1:3])), (0, 0)],
    )
    rows = _stacked(_transposed(_OUTPUT), _strided(padded, 1, _OUT, height), 0)
    return _stacked(_transposed(_OUTPUT), _strided(rows, 3, _OUT, width), 1)


def _join_tiles(tiles: Float[Array, "6 6 B h w F"]) -> Float[Array, "B H W F"]:
    """Transforms the products back to 4x4 output tiles and joins the tiles to maps."""
    rows = _combined(_OUTPUT, [*tiles])
    parts = [_combined(_OUTPUT, [*row]) for row in rows]
    y = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
    batch, height, _, width, _, features = y.shape
    return y.reshape(batch, height * _OUT, width * _OUT, features)


def _transform_both(matrix: Matrix, x: Array, axis: int) -> Array:
    """Multiplies the matrix along `axis` and along the axis after it."""
    rows = _stacked(
        matrix, [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])], axis
    )
    return _stacked(
        matrix,
        [lax.index_in_dim(rows, i, axis + 1, keepdims=False) for i in range(x.shape[axis + 1])],
        axis + 1,
    )


def _strided(x: Array, axis: int, count: int, tiles: int) -> list[Array]:
    """Returns the values at positions 0, 1, ..., count - 1 of all tiles along an axis."""
    return [lax.slice_in_dim(x, i, i + _OUT * (tiles - 1) + 1, _OUT, axis) for i in range(count)]


def _stacked(matrix: Matrix, parts: Sequence[Array], axis: int) -> Array:
    return jnp.stack(_combined(matrix, parts), axis=axis)


def _combined(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """Multiplies the matrix with a list of arrays, leaving out the terms with a factor of 0.

    Sums of a few arrays are faster than a 6x6 matrix product.
    """
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
