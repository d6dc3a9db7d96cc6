"""Tests that convolutions equal XLA's, use one formulation per platform, and move no images."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dgl_jax.ops import conv
from dgl_jax.ops.conv import conv_general_dilated
from dgl_jax.ops.cpu import chunks

pytestmark = pytest.mark.full_compile

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = {
    "3x3": ((3, 3, 6, 5), (1, 1), "SAME", {}),
    "3x3, stride 2": ((3, 3, 6, 5), (2, 2), ((1, 1), (1, 1)), {}),
    "5x3, valid, dilated": ((5, 3, 6, 4), (1, 2), "VALID", {"rhs_dilation": (1, 2)}),
    "grouped": ((3, 3, 2, 6), (1, 1), "SAME", {"feature_group_count": 3}),
    "1x1": ((1, 1, 6, 5), (1, 1), "SAME", {}),
}


@pytest.fixture
def cut(monkeypatch):
    """Cuts batches of every size into chunks of eight images."""
    monkeypatch.setattr(conv, "UNCUT_BYTES", 0)
    monkeypatch.setattr(conv, "CHUNK_BYTES", 0)


def gradients(function, shape, strides, padding, options, batch=24, dtype="float32"):
    """Returns outputs, and gradients of a random linear function of the outputs."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, 9, 8, 6)), dtype)
    kernel = jnp.asarray(random.normal(size=shape), dtype)

    def apply(x, kernel):
        return function(x, kernel, strides, padding, dimension_numbers=NHWC, **options)

    cotangent = jnp.asarray(random.normal(size=jax.eval_shape(apply, x, kernel).shape), dtype)

    def run(x, kernel, cotangent):
        outputs, pull = jax.vjp(apply, x, kernel)
        return [outputs, *pull(cotangent)]

    return jax.jit(run)(x, kernel, cotangent)


def relative_error(case, **changed):
    """Returns the largest difference from XLA's arrays, relative to each array's largest value.

    Sums that nearly cancel have no relative precision of their own.
    """
    pairs = zip(
        gradients(conv_general_dilated, *CASES[case], **changed),
        gradients(lax.conv_general_dilated, *CASES[case], **changed),
    )
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_xla(case):
    assert relative_error(case) < 1e-5


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_chunks_equal_xla(case):
    assert relative_error(case) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype", "images"),
    [
        ((64, 16, 16, 8), 16, "float32", 64),  # 1 MiB of outputs
        ((64, 16, 16, 8), 17, "float32", 16),  # more: 17 KiB per image, 16 of them in 272 KiB
        ((64, 32, 32, 8), 4, "bfloat16", 64),  # 1 MiB of inputs
        ((64, 32, 32, 8), 4, "float32", 8),  # 32 KiB per image
        ((1024, 8, 8, 32), 32, "float32", 32),  # 8 KiB
        ((64, 64, 64, 32), 32, "float32", 8),  # half a MiB, eight images at least
        ((257, 32, 32, 8), 8, "float32", 257),  # no divisor
    ],
)
def test_only_batches_larger_than_the_caches_are_cut(inputs, outputs, dtype, images):
    maps = [
        jax.ShapeDtypeStruct((*inputs[:3], channels), dtype) for channels in (inputs[3], outputs)
    ]
    assert conv.images_per_chunk(*maps) == conv.images_per_chunk(*maps[::-1]) == images


# One image, almost a chunk, a prime number, two chunks of ten.
@pytest.mark.parametrize("batch", [1, 7, 23, 20])
@pytest.mark.usefixtures("cut")
def test_gradients_equal_xla_for_any_batch_size(batch):
    assert relative_error("3x3", batch=batch) < 1e-5


def test_twin_lost_chunk_fails(cut, monkeypatch, fresh_traces):
    chunk = chunks.chunk
    monkeypatch.setattr(chunks, "chunk", lambda x, size, i: chunk(x, size, max(i, 1)))
    assert relative_error("3x3") > 1e-2


def test_twin_mismatched_images_in_a_chunk_fail(cut, monkeypatch, fresh_traces):
    chunk = chunks.chunk
    monkeypatch.setattr(
        chunks, "chunk", lambda x, size, i: chunk(x if x.shape[-1] == 6 else x[::-1], size, i)
    )
    assert relative_error("3x3") > 1e-2


def plain(
    shape=(32, 8, 8, 32),
    kernel=(3, 3, 32, 64),
    strides=(1, 1),
    padding=((1, 1), (1, 1)),
    dtype="float32",
    **options,
):
    x, kernel = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, kernel))
    return conv._is_plain_3x3(x, kernel, strides, padding, **{"dimension_numbers": NHWC} | options)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"padding": "SAME"},
        {"lhs_dilation": (1, 1), "rhs_dilation": None, "feature_group_count": 1, "precision": None},
    ],
)
def test_plain_3x3_convolutions_are_recognized(case):
    assert plain(**case)


@pytest.mark.parametrize(
    "case",
    [
        {"strides": (2, 2)},
        {"padding": ((0, 0), (0, 0))},
        {"padding": "VALID"},
        {"kernel": (1, 1, 32, 64)},
        {"kernel": (5, 5, 32, 64)},
        {"dtype": "bfloat16"},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"shape": (32, 8, 8, 64), "feature_group_count": 2},
        {
            "shape": (32, 32, 8, 8),
            "kernel": (64, 32, 3, 3),
            "dimension_numbers": ("NCHW", "OIHW", "NCHW"),
        },
    ],
)
def test_other_convolutions_are_not_plain_3x3(case):
    assert not plain(**case)


def kernel_gradient(x, kernel):
    return jax.grad(
        lambda k: (conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC) ** 2).sum()
    )(kernel)


X, KERNEL = (
    jax.ShapeDtypeStruct((32, 8, 8, 6), "float32"),
    jax.ShapeDtypeStruct((3, 3, 6, 5), "float32"),
)


@pytest.mark.parametrize(
    ("platform", "convolutions"), [("cpu", 1 + 4), ("cuda", 1 + 1), ("tpu", 1 + 1)]
)
def test_each_platform_has_its_formulation(cut, platform, convolutions):
    text = jax.jit(kernel_gradient).trace(X, KERNEL).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_program_has_one_branch_and_no_unused_input_gradient(cut):
    text = jax.jit(kernel_gradient).lower(X, KERNEL).compile().as_text()
    assert "conditional" not in text
    assert text.count(" convolution(") == 1 + 4


def collectives(devices):
    """Returns the collectives of a gradient whose batch is split among devices, and checks it."""
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    random = np.random.default_rng(0)
    x, kernel = (
        random.normal(size=X.shape).astype("float32"),
        random.normal(size=KERNEL.shape).astype("float32"),
    )

    def fresh(x, kernel):  # a new function is always traced, also after a patch
        return kernel_gradient(x, kernel)

    compiled = (
        jax.jit(fresh, in_shardings=(split, everywhere), out_shardings=everywhere)
        .lower(X, KERNEL)
        .compile()
    )
    actual = compiled(jax.device_put(x, split), jax.device_put(kernel, everywhere))
    expected = kernel_gradient(x, kernel)
    np.testing.assert_allclose(
        actual, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max())
    )
    return set(
        re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text())
    )


def test_images_stay_on_their_devices(cut, devices):
    assert collectives(devices) == {"all-reduce"}


def test_twin_images_that_move_fail(cut, devices, monkeypatch, fresh_traces):
    monkeypatch.setattr(chunks, "chunk", lambda x, size, i: x[i * size : (i + 1) * size])
    assert collectives(devices) != {"all-reduce"}


@pytest.mark.medium
def test_chunks_are_summed_in_float32(cut, monkeypatch, fresh_traces):
    """Checks that a sum over many chunks in bfloat16 would be less precise."""

    def error():
        rounded, exact = (
            gradients(conv_general_dilated, *CASES["3x3"], batch=64, dtype=dtype)[2]
            for dtype in ("bfloat16", "float32")
        )
        assert rounded.dtype == "bfloat16"
        return float(jnp.linalg.norm(rounded.astype("float32") - exact) / jnp.linalg.norm(exact))

    in_float32 = error()
    monkeypatch.setattr(conv, "_SUM_DTYPE", "bfloat16")
    assert error() > 1.2 * in_float32
