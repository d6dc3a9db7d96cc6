"""Batch norm with a gradient of its own is flax's layer and its automatic gradient, with the ReLU and the bias around it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dgl_jax.ops import batch_norm
from dgl_jax.ops.batch_norm import BatchNorm

pytestmark = pytest.mark.full_compile

SHAPES = {"maps": (6, 5, 4, 3), "features": (9, 4), "tokens": (4, 3, 5)}


class Library(nn.Module):
    """What is to be computed: an addition, flax's layer, a ReLU."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train, *, relu, offset):
        y = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="own"
        )(x + offset)
        return nn.relu(y) if relu else y


class Own(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train, *, relu, offset):
        return BatchNorm(dtype=self.dtype, name="own")(x, train, relu=relu, offset=offset)


def values(shape, dtype="float32"):
    random = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(random.normal(0.7, 1.5, shape), dtype) for _ in range(2))
    offset, scale, bias, mean, var = (
        random.uniform(0.3, 1.5, shape[-1]).astype(np.float32) for _ in range(5)
    )
    variables = {
        "params": {"own": {"scale": scale, "bias": bias - 1}},
        "batch_stats": {"own": {"mean": mean, "var": var}},
    }
    return variables, x, offset.astype(dtype), cotangent


def computed(module, relu, train=True, shape=SHAPES["maps"], dtype="float32"):
    """Outputs, running averages, and gradients of the parameters, of the input and of the offset."""
    variables, x, offset, cotangent = values(shape, dtype)

    def run(params, x, offset):
        given = variables | {"params": params}
        y, updated = module(dtype).apply(
            given, x, train, relu=relu, offset=offset, mutable=["batch_stats"]
        )
        return y, updated

    y, pull, updated = jax.vjp(run, variables["params"], x, offset, has_aux=True)
    return y, updated, *pull(cotangent.astype(y.dtype))


def close(found, right, rtol):
    # Sums that nearly cancel leave no relative precision in single values.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(np.abs(b).max(), 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_librarys_layer_and_its_gradient(shape, relu):
    *found, of_offset = computed(Own, relu, shape=shape)
    *right, vanishing = computed(Library, relu, shape=shape)
    close(found, right, 1e-5)
    assert not np.any(of_offset)  # exactly
    assert np.abs(vanishing).max() < 1e-4  # but for rounding


@pytest.mark.parametrize("relu", [False, True])
def test_in_evaluation(relu):
    close(computed(Own, relu, train=False), computed(Library, relu, train=False), 1e-5)


def test_bfloat16_is_worked_out_in_float32():
    *found, _ = computed(Own, True, dtype="bfloat16")
    *right, _ = computed(Own, True)
    assert found[0].dtype == found[3].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
    variables, x, offset, _ = values(SHAPES["maps"], "bfloat16")
    _, updated = Own("bfloat16").apply(
        variables, x, True, relu=True, offset=offset, mutable=["batch_stats"]
    )
    mean = np.asarray(x, np.float64).mean((0, 1, 2)) + np.asarray(offset, np.float64)
    before = variables["batch_stats"]["own"]["mean"]
    np.testing.assert_allclose(
        updated["batch_stats"]["own"]["mean"], 0.9 * before + 0.1 * mean, rtol=1e-6
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


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layer_is_noticed(name, monkeypatch, traced_anew):
    monkeypatch.setattr(batch_norm, *BROKEN[name])
    with pytest.raises(AssertionError):
        close(computed(Own, True), computed(Library, True), 1e-5)


def test_a_gradient_that_forgets_the_statistics_is_noticed():
    *right, _ = computed(Library, False)
    variables, _, _, cotangent = values(SHAPES["maps"])
    found = computed(Own, False)
    scale, var = (
        variables["params"]["own"]["scale"],
        np.var(np.asarray(values(SHAPES["maps"])[1]), (0, 1, 2)),
    )
    forgetful = cotangent * scale / np.sqrt(var + 1e-5)
    with pytest.raises(AssertionError):
        close([*found[:3], forgetful], right, 1e-5)


def test_a_first_call_leaves_the_averages_alone():
    variables = BatchNorm().init(jax.random.key(0), values(SHAPES["maps"])[1], True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_equal_values_divide_by_nothing():
    """Of a constant the mean of squares less the square of the mean may come out below 0."""
    y, _, var = batch_norm.normalize(jnp.full((64, 3), 1234.567), jnp.ones(3), jnp.zeros(3), False)
    assert np.all(np.isfinite(y))
    assert np.all(var >= 0)


def test_nothing_of_the_maps_size_is_kept_but_the_input():
    variables, x, offset, _ = values((8, 16, 16, 32))
    apply = lambda x: Own().apply(
        variables, x, True, relu=True, offset=offset, mutable=["batch_stats"]
    )
    _, pull, _ = jax.vjp(apply, x, has_aux=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) < x.size + 10 * x.shape[-1]


def test_statistics_are_those_of_all_devices(devices):
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    variables, x, offset, cotangent = values((8 * len(devices), 4, 4, 3))

    def run(x, cotangent):
        apply = lambda x: Own().apply(
            variables, x, True, relu=True, offset=offset, mutable=["batch_stats"]
        )
        y, pull, updated = jax.vjp(apply, x, has_aux=True)
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
