"""Tests that Winograd equals the direct convolution, and is used if there are enough channels."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dgl_jax.ops.conv import conv_general_dilated
from dgl_jax.ops.cpu import chunks, winograd

pytestmark = pytest.mark.full_compile

NHWC = ("NHWC", "HWIO", "NHWC")
SHAPES = [
    (3, 8, 8, 5, 7),
    (5, 4, 9, 2, 3),
    (2, 7, 7, 33, 32),
    (64, 8, 8, 4, 4),
    (7, 16, 20, 3, 2),
    (1, 1, 2, 1, 1),
]


def arrays(batch, height, width, channels, features, dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = (
        (batch, height, width, channels),
        (3, 3, channels, features),
        (batch, height, width, features),
    )
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


def direct(x, kernel, cotangent):
    """Returns outputs, input gradient and kernel gradient in float64."""
    x, kernel, cotangent = (a.astype(np.float64) for a in (x, kernel, cotangent))
    padded, padded_gradient = (
        np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
        np.zeros(np.add(x.shape, (0, 2, 2, 0))),
    )
    outputs, kernel_gradient = np.zeros(cotangent.shape), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            shifted = np.s_[:, i : i + x.shape[1], j : j + x.shape[2]]
            outputs += padded[shifted] @ kernel[i, j]
            padded_gradient[shifted] += cotangent @ kernel[i, j].T
            kernel_gradient[i, j] = np.einsum("bhwc,bhwf->cf", padded[shifted], cotangent)
    return outputs, padded_gradient[:, 1:-1, 1:-1], kernel_gradient


def relative_errors(shape):
    """Returns the largest error of each of the three results, relative to its RMS."""
    x, kernel, cotangent = arrays(*shape)

    @jax.jit  # one compilation instead of one for each of hundreds of operations
    def all_three(x, kernel, cotangent):
        return (
            winograd.convolve(x, kernel),
            winograd.input_gradient(kernel, cotangent),
            winograd.kernel_gradient(x, cotangent),
        )

    actual = all_three(x, kernel, cotangent)
    return [
        np.abs(a - b).max() / np.sqrt((b**2).mean())
        for a, b in zip(actual, direct(x, kernel, cotangent), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_direct_convolution(shape):
    assert max(relative_errors(shape)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_INPUT", "_KERNEL", "_OUTPUT"])
def test_twin_wrong_matrix_fails(name, monkeypatch, fresh_traces):
    matrix = np.array(getattr(winograd, name))
    matrix[2, 1] += 0.01
    monkeypatch.setattr(winograd, name, matrix.tolist())
    assert min(relative_errors(SHAPES[0])) > 1e-3


@pytest.mark.medium
def test_results_do_not_depend_on_the_number_of_chunks(monkeypatch, fresh_traces):
    x, kernel, cotangent = arrays(12, 8, 8, 3, 5)

    def outputs_and_gradient():
        def fresh(x, kernel, cotangent):  # a new function is always traced, also after a patch
            return winograd.convolve(x, kernel), winograd.kernel_gradient(x, cotangent)

        return jax.jit(fresh)(x, kernel, cotangent)

    one = outputs_and_gradient()
    monkeypatch.setattr(winograd, "_TILES", 8)  # two images per chunk
    many = outputs_and_gradient()
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    chunk = chunks.chunk
    # Twin: the images of a chunk are in another order.
    monkeypatch.setattr(chunks, "chunk", lambda x, size, i: chunk(x, size, i)[::-1])
    assert np.abs(outputs_and_gradient()[0] - one[0]).max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "images"),
    [((128, 8, 8), 32), ((128, 16, 16), 8), ((37, 8, 8), 37), ((50, 7, 9), 25), ((6, 224, 224), 1)],
)
def test_chunk_has_the_fewest_images_with_enough_tiles(shape, images):
    assert winograd._chunk_size(jnp.empty((*shape, 1))) == images


def test_matrices_equal_those_in_the_paper():
    """Compares the matrices for the points of Lavin and Gray's F(4, 3): 0, 1, -1, 2 and -2.

    Each row may be multiplied by a factor if the same row of the other matrix is divided by it.
    """
    inputs, kernels, outputs = (
        np.array(m) for m in winograd._matrices([Fraction(p) for p in (0, 1, -1, 2, -2)])
    )
    published = [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
    np.testing.assert_array_equal(np.abs(inputs), np.abs(published))
    np.testing.assert_array_equal(
        outputs,
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    )
    np.testing.assert_allclose(
        np.abs(kernels[:, 0]), [1 / 4, 1 / 6, 1 / 6, 1 / 24, 1 / 24, 0], rtol=1e-15
    )
    line, kernel = np.arange(6.0), np.array([1.0, -2.0, 5.0])
    np.testing.assert_allclose(
        outputs @ ((kernels @ kernel) * (inputs @ line)), [8, 12, 16, 20], rtol=1e-13
    )


def fits(shape=(32, 8, 8, 32), kernel=(3, 3, 32, 64)):
    return winograd.fits(*(jax.ShapeDtypeStruct(s, "float32") for s in (shape, kernel)))


@pytest.mark.parametrize("shape", [(32, 8, 8, 32), (8, 14, 14, 32), (128, 4, 4, 32)])
def test_winograd_is_used_for_many_channels_and_tiles(shape):
    assert fits(shape)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((32, 8, 8, 31), (3, 3, 31, 64)),  # too few channels
        ((32, 8, 8, 32), (3, 3, 32, 31)),
        ((31, 8, 8, 32), (3, 3, 32, 64)),  # too few tiles
        ((128, 3, 3, 32), (3, 3, 32, 64)),  # too small a map
    ],
)
def test_winograd_is_not_used_for_other_shapes(shape, kernel):
    assert not fits(shape, kernel)


def test_winograd_is_not_used_for_a_symbolic_batch_size():
    assert not fits((jax.export.symbolic_shape("b")[0], 8, 8, 32))


def gradients(x, kernel):
    return jax.grad(
        lambda x, k: (
            conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC) ** 2
        ).sum(),
        (0, 1),
    )(x, kernel)


X, KERNEL = (
    jax.ShapeDtypeStruct((64, 8, 8, 32), "float32"),
    jax.ShapeDtypeStruct((3, 3, 32, 32), "float32"),
)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_winograd_is_used_on_a_cpu_only(platform, convolutions):
    text = jax.jit(gradients).trace(X, KERNEL).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.medium
def test_gradients_of_convolution_equal_xla():
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s.shape).astype(np.float32) for s in (X, KERNEL))
    plain = jax.grad(
        lambda x, k: (
            lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC) ** 2
        ).sum(),
        (0, 1),
    )
    for a, b in zip(jax.jit(gradients)(x, kernel), jax.jit(plain)(x, kernel), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def collectives(devices):
    """Returns error and collectives of the gradients of a batch that is split among devices."""
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s.shape).astype(np.float32) for s in (X, KERNEL))

    def fresh(x, kernel):  # a new function is always traced, also after a patch
        return gradients(x, kernel)

    compiled = (
        jax.jit(fresh, in_shardings=(split, everywhere), out_shardings=(split, everywhere))
        .lower(X, KERNEL)
        .compile()
    )
    actual = compiled(jax.device_put(x, split), jax.device_put(kernel, everywhere))
    error = max(
        np.abs(a - b).max() / np.abs(b).max()
        for a, b in zip(actual, jax.jit(gradients)(x, kernel), strict=True)
    )
    return error, re.findall(
        r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text()
    )


@pytest.mark.medium
def test_images_stay_on_their_devices(devices):
    error, sent = collectives(devices)
    assert error < 1e-5
    assert sent == ["all-reduce"]  # sums the gradient of the kernel


@pytest.mark.slow
def test_twin_images_that_move_fail(devices, monkeypatch, fresh_traces):
    with monkeypatch.context() as patched:
        patched.setattr(
            chunks, "chunk", lambda x, size, i: lax.dynamic_slice_in_dim(x, i * size, size)
        )
        jax.clear_caches()  # JAX caches the branches of `platform_dependent`
        sent = collectives(devices)[1]
    jax.clear_caches()
    assert sent != ["all-reduce"]
