"""The convolution's gradients are XLA's own, on each platform in that platform's formulation, and stay where the batch is."""

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


def gradients(function, shape, strides, padding, options, batch=24, dtype="float32"):
    """Of the input and of the kernel, of a generic linear function of the output."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, 9, 8, 6)), dtype)
    kernel = jnp.asarray(random.normal(size=shape), dtype)
    apply = lambda *args: function(*args, strides, padding, dimension_numbers=NHWC, **options)  # noqa: E731
    cotangent = jnp.asarray(random.normal(size=jax.eval_shape(apply, x, kernel).shape), dtype)

    def run(x, kernel, cotangent):
        outputs, pull = jax.vjp(apply, x, kernel)
        return [outputs, *pull(cotangent)]

    return jax.jit(run)(x, kernel, cotangent)


def furthest(case, **changed):
    """Relative to the largest value of each array: sums that nearly cancel have no relative precision."""
    pairs = zip(
        gradients(conv_general_dilated, *CASES[case], **changed),
        gradients(lax.conv_general_dilated, *CASES[case], **changed),
    )
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_librarys(case):
    assert furthest(case) < 1e-5


@pytest.mark.parametrize(
    "batch", [1, 7, 23, 20]
)  # fewer than a chunk, just fewer, a prime number, two chunks of ten
def test_any_batch(batch):
    assert furthest("3x3", batch=batch) < 1e-5


def test_a_lost_chunk_is_noticed(monkeypatch, traced_anew):
    chunk = chunks.chunk
    monkeypatch.setattr(chunks, "chunk", lambda x, size, i: chunk(x, size, max(i, 1)))
    assert furthest("3x3") > 1e-2


def test_other_images_in_a_chunk_are_noticed(monkeypatch, traced_anew):
    chunk = chunks.chunk
    monkeypatch.setattr(
        chunks, "chunk", lambda x, size, i: chunk(x if x.shape[-1] == 6 else x[::-1], size, i)
    )
    assert furthest("3x3") > 1e-2


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
def test_what_the_other_formulations_are_of(case):
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
def test_what_they_are_not_of(case):
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
def test_each_platform_gets_its_formulation(platform, convolutions):
    text = jax.jit(kernel_gradient).trace(X, KERNEL).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_compiled_with_one_branch_and_no_gradient_of_an_input_that_needs_none():
    text = jax.jit(kernel_gradient).lower(X, KERNEL).compile().as_text()
    assert "conditional" not in text
    assert text.count(" convolution(") == 1 + 4


def collectives(devices):
    """What a batch that is split among devices makes them send each other, and how far the gradient is from one device's."""
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
    fresh = lambda x, kernel: kernel_gradient(x, kernel)  # noqa: E731  traced anew, whatever was patched
    compiled = (
        jax.jit(fresh, in_shardings=(split, everywhere), out_shardings=everywhere)
        .lower(X, KERNEL)
        .compile()
    )
    found = compiled(jax.device_put(x, split), jax.device_put(kernel, everywhere))
    expected = kernel_gradient(x, kernel)
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max())
    )
    return set(
        re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text())
    )


def test_images_stay_on_their_devices(devices):
    assert collectives(devices) == {"all-reduce"}


def test_images_that_move_are_noticed(devices, monkeypatch, traced_anew):
    monkeypatch.setattr(chunks, "chunk", lambda x, size, i: x[i * size : (i + 1) * size])
    assert collectives(devices) != {"all-reduce"}


def test_chunks_are_summed_in_float32(monkeypatch, traced_anew):
    """In bfloat16 the sum of many chunks would lose what each adds."""

    def error():
        found, exact = (
            gradients(conv_general_dilated, *CASES["3x3"], batch=64, dtype=dtype)[2]
            for dtype in ("bfloat16", "float32")
        )
        assert found.dtype == "bfloat16"
        return float(jnp.linalg.norm(found.astype("float32") - exact) / jnp.linalg.norm(exact))

    in_float32 = error()
    monkeypatch.setattr(conv, "_SUM_DTYPE", "bfloat16")
    assert error() > 1.2 * in_float32
