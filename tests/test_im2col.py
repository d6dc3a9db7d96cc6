"""Tests that im2col equals the direct convolution, and is used if there are few channels."""

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


def relative_error(shape):
    """Returns the largest error of outputs and kernel gradient, relative to the RMS of each."""
    x, kernel, cotangent = arrays(*shape)
    outputs, _, kernel_gradient = direct(x, kernel, cotangent)
    actual = im2col.convolve(x, jnp.asarray(kernel)), im2col.kernel_gradient(x, cotangent)
    return max(
        np.abs(a - b).max() / np.sqrt((b**2).mean())
        for a, b in zip(actual, (outputs, kernel_gradient), strict=True)
    )


@pytest.mark.medium
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_kernel_gradient_equal_direct_convolution(shape):
    assert relative_error(shape) < 1e-5


def test_twin_reversed_kernel_columns_fail(monkeypatch, fresh_traces):
    pair_kernel = im2col._pair_kernel
    monkeypatch.setattr(im2col, "_pair_kernel", lambda kernel: pair_kernel(kernel[:, ::-1]))
    assert relative_error(SHAPES[0]) > 1e-2


def test_gradient_does_not_depend_on_the_number_of_chunks(monkeypatch, fresh_traces):
    x, _, cotangent = arrays(12, 8, 8, 3, 5)
    one = im2col.kernel_gradient(x, cotangent)
    monkeypatch.setattr(im2col, "_PAIRS", 64)  # two images per chunk
    assert np.abs(im2col.kernel_gradient(x, cotangent) - one).max() < 1e-5 * np.abs(one).max()
    chunk = chunks.chunk
    # Twin: every chunk holds the same images.
    monkeypatch.setattr(chunks, "chunk", lambda x, size, i: chunk(x, size, 0))
    assert np.abs(im2col.kernel_gradient(x, cotangent) - one).max() > 1e-2 * np.abs(one).max()


def shapes(shape=(4, 8, 8, 3), kernel=(3, 3, 3, 32)):
    return [jax.ShapeDtypeStruct(s, "float32") for s in (shape, kernel)]


def test_im2col_is_used_for_few_channels():
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
        ((4, 8, 7, 3), (3, 3, 3, 32)),  # an odd width, whose last column has no partner
    ],
)
def test_im2col_is_not_used_for_other_shapes(shape, kernel):
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
def test_im2col_is_used_on_a_cpu_only(platform, convolutions):
    text = jax.jit(results).trace(X, KERNEL).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.medium
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
    actual = compiled(jax.device_put(x, split), jax.device_put(kernel, everywhere))
    for a, b in zip(actual, results(x, kernel), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    assert re.findall(
        r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text()
    ) == ["all-reduce"]
