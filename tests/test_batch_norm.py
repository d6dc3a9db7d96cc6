"""Tests that batch norm with its custom gradient equals flax's layer, with bias and ReLU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from traced import equations

from dgl_jax.ops import batch_norm
from dgl_jax.ops.batch_norm import BatchNorm

pytestmark = pytest.mark.full_compile

SHAPES = {"maps": (6, 5, 4, 3), "features": (9, 4), "tokens": (4, 3, 5)}


class Reference(nn.Module):
    """Reference with flax: an addition, batch norm and a ReLU."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train, *, relu, offset):
        y = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="norm"
        )(x + offset)
        return nn.relu(y) if relu else y


class Actual(nn.Module):
    dtype: str = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x, train, *, relu, offset):
        norm = BatchNorm(dtype=self.dtype, ops=self.ops, name="norm")
        return norm(x, train, relu=relu, offset=offset)


class Joint(Actual):
    ops: str = "joint"


def values(shape, dtype="float32"):
    random = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(random.normal(0.7, 1.5, shape), dtype) for _ in range(2))
    offset, scale, bias, mean, var = (
        random.uniform(0.3, 1.5, shape[-1]).astype(np.float32) for _ in range(5)
    )
    variables = {
        "params": {"norm": {"scale": scale, "bias": bias - 1}},
        "batch_stats": {"norm": {"mean": mean, "var": var}},
    }
    return variables, x, offset.astype(dtype), cotangent


def computed(module, relu, train=True, shape=SHAPES["maps"], dtype="float32"):
    """Returns outputs, running averages, and gradients of parameters, input and offset."""
    variables, x, offset, cotangent = values(shape, dtype)

    def run(params, x, offset):
        changed = variables | {"params": params}
        y, updated = module(dtype).apply(
            changed, x, train, relu=relu, offset=offset, mutable=["batch_stats"]
        )
        return y, updated

    y, pull, updated = jax.vjp(run, variables["params"], x, offset, has_aux=True)
    return y, updated, *pull(cotangent.astype(y.dtype))


def close(actual, expected, rtol):
    # The absolute tolerance is relative to the largest value: sums that nearly cancel leave no
    # relative precision in single values.
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(np.abs(b).max(), 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_training_equal_flax(shape, relu):
    *actual, offset_gradient = computed(Actual, relu, shape=shape)
    *expected, reference_offset_gradient = computed(Reference, relu, shape=shape)
    close(actual, expected, 1e-5)
    assert not np.any(offset_gradient)  # exactly 0
    assert np.abs(reference_offset_gradient).max() < 1e-4  # 0 up to rounding


def reductions(module):
    """Counts the reductions over a map in a layer and its gradient, by their number of sums."""
    jaxpr = jax.make_jaxpr(lambda: computed(module, True))().jaxpr
    return [
        len(e.outvars)
        for e in equations(jaxpr)
        if e.primitive.name in ("reduce", "reduce_sum") and e.invars[0].aval.ndim == 4
    ]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_joint_sums_equal_separate_sums(shape):
    close(computed(Joint, True, shape=shape), computed(Actual, True, shape=shape), 1e-5)
    assert reductions(Joint) == [2, 2]
    assert reductions(Actual) == [1, 1, 1, 1]


def test_twin_joint_sums_in_the_wrong_order_fail(monkeypatch):
    original = batch_norm._sums
    expected = computed(Actual, True)
    monkeypatch.setattr(batch_norm, "_sums", lambda *args: original(*args)[::-1])
    with pytest.raises(AssertionError):
        close(computed(Joint, True), expected, 1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_values_and_gradients_in_evaluation_equal_flax(relu):
    close(computed(Actual, relu, train=False), computed(Reference, relu, train=False), 1e-5)


def test_bfloat16_inputs_are_normalized_in_float32():
    *actual, _ = computed(Actual, True, dtype="bfloat16")
    *expected, _ = computed(Actual, True)
    assert actual[0].dtype == actual[3].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
    variables, x, offset, _ = values(SHAPES["maps"], "bfloat16")
    _, updated = Actual("bfloat16").apply(
        variables, x, True, relu=True, offset=offset, mutable=["batch_stats"]
    )
    mean = np.asarray(x, np.float64).mean((0, 1, 2)) + np.asarray(offset, np.float64)
    before = variables["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(
        updated["batch_stats"]["norm"]["mean"], 0.9 * before + 0.1 * mean, rtol=1e-6
    )


BROKEN = {
    "variance": (
        "lax",
        type(
            "lax", (), {**vars(jax.lax), "rsqrt": staticmethod(lambda x: 1.01 * jax.lax.rsqrt(x))}
        ),
    ),
    "momentum": ("MOMENTUM", 0.8),
    "epsilon": ("EPSILON", 1e-1),
    "mask": ("_affine", lambda x, mean, inverse, scale, bias: (x - mean) * (inverse * scale)),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", BROKEN)
def test_twin_broken_layer_fails(name, monkeypatch, fresh_traces):
    monkeypatch.setattr(batch_norm, *BROKEN[name])
    with pytest.raises(AssertionError):
        close(computed(Actual, True), computed(Reference, True), 1e-5)


def test_twin_gradient_with_constant_statistics_fails():
    *expected, _ = computed(Reference, False)
    variables, _, _, cotangent = values(SHAPES["maps"])
    actual = computed(Actual, False)
    scale, var = (
        variables["params"]["norm"]["scale"],
        np.var(np.asarray(values(SHAPES["maps"])[1]), (0, 1, 2)),
    )
    constant_statistics = cotangent * scale / np.sqrt(var + 1e-5)
    with pytest.raises(AssertionError):
        close([*actual[:3], constant_statistics], expected, 1e-5)


def test_initialization_does_not_update_the_running_averages():
    variables = BatchNorm().init(jax.random.key(0), values(SHAPES["maps"])[1], True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_constant_input_has_finite_output_and_no_negative_variance():
    """Normalizes a constant: the mean of squares minus the squared mean may round below 0."""
    y, _, var = batch_norm.normalize(jnp.full((64, 3), 1234.567), jnp.ones(3), jnp.zeros(3), False)
    assert np.all(np.isfinite(y))
    assert np.all(var >= 0)


def training_apply(variables, offset):
    def apply(x):
        return Actual().apply(variables, x, True, relu=True, offset=offset, mutable=["batch_stats"])

    return apply


def test_input_is_the_only_map_stored_for_the_backward_pass():
    variables, x, offset, _ = values((8, 16, 16, 32))
    _, pull, _ = jax.vjp(training_apply(variables, offset), x, has_aux=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) < x.size + 10 * x.shape[-1]


def test_statistics_are_taken_over_all_devices(devices):
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    variables, x, offset, cotangent = values((8 * len(devices), 4, 4, 3))

    def run(x, cotangent):
        y, pull, updated = jax.vjp(training_apply(variables, offset), x, has_aux=True)
        return y, pull(cotangent)[0], updated

    compiled = (
        jax.jit(run, in_shardings=(split, split), out_shardings=(split, split, everywhere))
        .lower(x, cotangent)
        .compile()
    )
    close(
        compiled(jax.device_put(x, split), jax.device_put(cotangent, split)),
        run(x, cotangent),
        1e-5,
    )
    assert set(
        re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute)\(", compiled.as_text())
    ) == {"all-reduce"}
