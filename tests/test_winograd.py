"""Winograd's convolution is the direct one, a few times its rounding apart, and is taken where it pays."""

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
    """In float64: outputs, and the gradients of the input and of the kernel."""
    x, kernel, cotangent = (a.astype(np.float64) for a in (x, kernel, cotangent))
    padded, of_padded = (
        np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
        np.zeros(np.add(x.shape, (0, 2, 2, 0))),
    )
    outputs, of_kernel = np.zeros(cotangent.shape), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            there = np.s_[:, i : i + x.shape[1], j : j + x.shape[2]]
            outputs += padded[there] @ kernel[i, j]
            of_padded[there] += cotangent @ kernel[i, j].T
            of_kernel[i, j] = np.einsum("bhwc,bhwf->cf", padded[there], cotangent)
    return outputs, of_padded[:, 1:-1, 1:-1], of_kernel


def furthest(shape):
    """Of the three results, the largest error in units of the root mean square of the right values."""
    x, kernel, cotangent = arrays(*shape)

    @jax.jit  # one compilation, not one for each of hundreds of operations
    def all_three(x, kernel, cotangent):
        return (
            winograd.convolve(x, kernel),
            winograd.input_gradient(kernel, cotangent),
            winograd.kernel_gradient(x, cotangent),
        )

    found = all_three(x, kernel, cotangent)
    return [
        np.abs(f - right).max() / np.sqrt((right**2).mean())
        for f, right in zip(found, direct(x, kernel, cotangent), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_direct_convolution_and_its_gradients(shape):
    assert max(furthest(shape)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_INPUT", "_KERNEL", "_OUTPUT"])
def test_a_wrong_matrix_is_noticed(name, monkeypatch, traced_anew):
    matrix = np.array(getattr(winograd, name))
    matrix[2, 1] += 0.01
    monkeypatch.setattr(winograd, name, matrix.tolist())
    assert min(furthest(SHAPES[0])) > 1e-3


def test_one_chunk_and_many_are_the_same(monkeypatch, traced_anew):
    x, kernel, cotangent = arrays(12, 8, 8, 3, 5)

    def both():
        traced_anew = lambda x, kernel, cotangent: (
            winograd.convolve(x, kernel),
            winograd.kernel_gradient(x, cotangent),
        )
        return jax.jit(traced_anew)(x, kernel, cotangent)

    one = both()
    monkeypatch.setattr(winograd, "_TILES", 8)  # two images a chunk
    many = both()
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    chunk = chunks.chunk
    monkeypatch.setattr(
        chunks, "chunk", lambda x, size, i: chunk(x, size, i)[::-1]
    )  # images in another order
    assert np.abs(both()[0] - one[0]).max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "images"),
    [((128, 8, 8), 32), ((128, 16, 16), 8), ((37, 8, 8), 37), ((50, 7, 9), 25), ((6, 224, 224), 1)],
)
def test_images_of_a_chunk(shape, images):
    assert winograd._chunk_size(jnp.empty((*shape, 1))) == images


def test_matrices_of_the_paper():
    """Lavin and Gray's F(4, 3) has the points 0, 1, -1, 2, -2; a row's factor is free between input and kernel."""
    inputs, kernels, outputs = (
        np.array(m) for m in winograd._matrices([Fraction(p) for p in (0, 1, -1, 2, -2)])
    )
    published = np.array([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                          [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]])  # fmt: skip
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
def test_where_it_is_taken(shape):
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
def test_where_it_is_not(shape, kernel):
    assert not fits(shape, kernel)


def test_a_program_for_any_batch_takes_the_librarys():
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
def test_a_cpu_alone_takes_it(platform, convolutions):
    text = jax.jit(gradients).trace(X, KERNEL).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_a_convolution_has_the_librarys_gradients():
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s.shape).astype(np.float32) for s in (X, KERNEL))
    plain = jax.grad(
        lambda x, k: (
            lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC) ** 2
        ).sum(),
        (0, 1),
    )
    for found, right in zip(jax.jit(gradients)(x, kernel), jax.jit(plain)(x, kernel), strict=True):
        assert np.abs(found - right).max() < 1e-5 * np.abs(right).max()


def collectives(devices):
    """What a batch that is split among devices makes them send each other, and how far the gradients are from one device's."""
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s.shape).astype(np.float32) for s in (X, KERNEL))
    fresh = lambda x, kernel: gradients(x, kernel)  # noqa: E731  traced anew, whatever was patched
    compiled = (
        jax.jit(fresh, in_shardings=(split, everywhere), out_shardings=(split, everywhere))
        .lower(X, KERNEL)
        .compile()
    )
    found = compiled(jax.device_put(x, split), jax.device_put(kernel, everywhere))
    error = max(
        np.abs(f - right).max() / np.abs(right).max()
        for f, right in zip(found, jax.jit(gradients)(x, kernel), strict=True)
    )
    return error, re.findall(
        r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text()
    )


def test_images_stay_on_their_devices(devices):
    error, sent = collectives(devices)
    assert error < 1e-5
    assert sent == ["all-reduce"]  # of the kernel's gradient


@pytest.mark.slow
def test_images_that_move_are_noticed(devices, monkeypatch, traced_anew):
    with monkeypatch.context() as patched:
        patched.setattr(
            chunks, "chunk", lambda x, size, i: lax.dynamic_slice_in_dim(x, i * size, size)
        )
        jax.clear_caches()  # a branch of a choice by platform is traced once
        sent = collectives(devices)[1]
    jax.clear_caches()
    assert sent != ["all-reduce"]
