"""Convolutions of few channels as one matrix product are the direct ones, and are taken where they pay."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_winograd import arrays, direct

from dgl_jax.ops.conv import conv_general_dilated
from dgl_jax.ops.cpu import chunks, im2col

pytestmark = pytest.mark.full_compile

NHWC = ("NHWC", "HWIO", "NHWC")
SHAPES = [(3, 8, 8, 3, 5), (2, 5, 2, 1, 4), (1, 1, 6, 4, 2)]


def furthest(shape):
    """Of outputs and the kernel's gradient, the largest error in units of the root mean square of the right values."""
    x, kernel, cotangent = arrays(*shape)
    right, _, of_kernel = direct(x, kernel, cotangent)
    found = im2col.convolve(x, jnp.asarray(kernel)), im2col.kernel_gradient(x, cotangent)
    return max(
        np.abs(f - r).max() / np.sqrt((r**2).mean())
        for f, r in zip(found, (right, of_kernel), strict=True)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_direct_convolution_and_its_gradient(shape):
    assert furthest(shape) < 1e-5


def test_neighbours_in_another_order_are_noticed(monkeypatch, traced_anew):
    both = im2col._pair_kernel
    monkeypatch.setattr(im2col, "_pair_kernel", lambda kernel: both(kernel[:, ::-1]))
    assert furthest(SHAPES[0]) > 1e-2


def test_one_chunk_and_many_are_the_same(monkeypatch, traced_anew):
    x, _, cotangent = arrays(12, 8, 8, 3, 5)
    one = im2col.kernel_gradient(x, cotangent)
    monkeypatch.setattr(im2col, "_PAIRS", 64)  # two images a chunk
    assert np.abs(im2col.kernel_gradient(x, cotangent) - one).max() < 1e-5 * np.abs(one).max()
    chunk = chunks.chunk
    monkeypatch.setattr(
        chunks, "chunk", lambda x, size, i: chunk(x, size, 0)
    )  # the same images in every chunk
    assert np.abs(im2col.kernel_gradient(x, cotangent) - one).max() > 1e-2 * np.abs(one).max()


def shapes(shape=(4, 8, 8, 3), kernel=(3, 3, 3, 32)):
    return [jax.ShapeDtypeStruct(s, "float32") for s in (shape, kernel)]


def test_where_it_is_taken():
    assert im2col.fits(*shapes())
    assert im2col.fits_outputs(*shapes())
    assert im2col.fits(*shapes((4, 8, 8, 1), (3, 3, 1, 4)))
    assert im2col.fits(*shapes((jax.export.symbolic_shape("b")[0], 8, 8, 3)))
    wide = shapes(kernel=(3, 3, 3, 33))
    assert im2col.fits(*wide)
    assert not im2col.fits_outputs(*wide)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((4, 8, 8, 5), (3, 3, 5, 32)),  # too many channels
        ((4, 8, 8, 3), (3, 3, 3, 3)),  # too few features
        ((4, 8, 7, 3), (3, 3, 3, 32)),  # a column without a neighbour
    ],
)
def test_where_it_is_not(shape, kernel):
    assert not im2col.fits(*shapes(shape, kernel))
    assert not im2col.fits_outputs(*shapes(shape, kernel))


def results(x, kernel):
    outputs, pull = jax.vjp(
        lambda k: conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC), kernel
    )
    return outputs, pull(outputs)[0]


X, KERNEL = (
    jax.ShapeDtypeStruct((16, 8, 8, 3), "float32"),
    jax.ShapeDtypeStruct((3, 3, 3, 32), "float32"),
)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 2), ("tpu", 2)])
def test_a_cpu_alone_takes_it(platform, convolutions):
    text = jax.jit(results).trace(X, KERNEL).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_images_stay_on_their_devices(devices):
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s.shape).astype(np.float32) for s in (X, KERNEL))
    compiled = (
        jax.jit(results, in_shardings=(split, everywhere), out_shardings=(split, everywhere))
        .lower(X, KERNEL)
        .compile()
    )
    found = compiled(jax.device_put(x, split), jax.device_put(kernel, everywhere))
    for a, b in zip(found, results(x, kernel), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    assert re.findall(
        r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text()
    ) == ["all-reduce"]
