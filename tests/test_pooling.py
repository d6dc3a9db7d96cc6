"""Tests that pooling equals flax's pooling, with one formulation per platform."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from flax import linen as nn
from jaxtyping import TypeCheckError, jaxtyped
from numpy_layers import adaptive_avg_pool as numpy_adaptive
from numpy_layers import close
from numpy_layers import max_pool_3x3 as numpy_max_3x3

from dgl_jax.ops import (
    adaptive_avg_pool,
    avg_pool_windows,
    max_pool_2x2,
    max_pool_3x3,
    max_pool_windows,
    pooling,
)
from dgl_jax.ops.cpu import pooling as on_cpu

pytestmark = pytest.mark.full_compile


def distinct(*shape, dtype=np.float32):
    """Returns an array of distinct numbers, so that there are no ties."""
    size = int(np.prod(shape))
    return (np.random.default_rng(0).permutation(size).reshape(shape) / size - 0.5).astype(dtype)


def flax_max(x):
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def flax_avg(x):
    return nn.avg_pool(x, (3, 2), strides=(3, 2))


def flax_max_3x3(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def avg_3x2(x):
    return adaptive_avg_pool(x, (2, 4))


def check_same(pool, reference, x):
    """Compares values and gradients of two pooling functions."""
    cotangent = distinct(*jax.eval_shape(reference, x).shape)
    for f in (lambda g, x: g(x), lambda g, x: jax.grad(lambda y: (g(y) * cotangent).sum())(x)):
        close(
            jax.jit(f, static_argnums=0)(pool, x),
            np.asarray(jax.jit(f, static_argnums=0)(reference, x)),
        )


@pytest.mark.parametrize(("pool", "reference"), [(max_pool_2x2, flax_max), (avg_3x2, flax_avg)])
def test_values_and_gradients_equal_flax(pool, reference, monkeypatch, fresh_traces):
    x = distinct(3, 6, 8, 5)
    check_same(pool, reference, x)
    monkeypatch.setattr(pooling, "_by_platform", lambda x, ops, *, cpu, elsewhere: elsewhere(x))
    check_same(lambda x: pool(x), reference, x)


@pytest.mark.parametrize(("pool", "reference"), [(max_pool_2x2, flax_max), (avg_3x2, flax_avg)])
def test_twin_broken_windows_fail(pool, reference, monkeypatch, fresh_traces):
    windows = on_cpu.windows
    monkeypatch.setattr(on_cpu, "windows", lambda x, *size: windows(jnp.roll(x, 1, axis=1), *size))
    with pytest.raises(AssertionError):
        check_same(lambda x: pool(x), reference, distinct(3, 6, 8, 5))


def relu_before(pool):
    return lambda x: pool(nn.relu(x))


def test_ties_after_a_relu_do_not_change_the_gradient():
    x = distinct(3, 6, 8, 5) - 0.3  # most windows hold several zeros after the ReLU
    check_same(relu_before(max_pool_2x2), relu_before(flax_max), x)


def test_first_of_equal_maxima_receives_the_gradient():
    x = np.random.default_rng(0).integers(0, 3, (3, 6, 8, 5)).astype(np.float32)
    check_same(max_pool_2x2, flax_max, x)
    with pytest.raises(AssertionError):  # twin: equal maxima share the gradient
        check_same(lambda x: on_cpu.windows(x, 2, 2).max((2, 4)), flax_max, x)
    one = jax.grad(lambda x: max_pool_2x2(x).sum())(jnp.ones((1, 2, 2, 1)))
    assert one.ravel().tolist() == [1, 0, 0, 0]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("ours", "flax_pool"), [(max_pool_windows, nn.max_pool), (avg_pool_windows, nn.avg_pool)]
)
def test_separate_windows_equal_flax_without_the_rest(ours, flax_pool, monkeypatch, fresh_traces):
    def reference(x):
        return flax_pool(x, (3, 3), strides=(3, 3))

    for x in (distinct(2, 7, 9, 5), np.asarray(nn.relu(distinct(2, 8, 10, 5) - 0.3))):
        check_same(relu_before(lambda x: ours(x, 3)), relu_before(reference), x)
    monkeypatch.setattr(pooling, "_by_platform", lambda x, ops, *, cpu, elsewhere: elsewhere(x))
    check_same(lambda x: ours(x, 3), reference, distinct(2, 7, 9, 5))


def test_twin_windows_with_the_first_row_left_out_fail(monkeypatch, fresh_traces):
    monkeypatch.setattr(pooling, "_whole_windows", lambda x, side: x[:, 1:][:, :6, :9])
    with pytest.raises(AssertionError):
        check_same(
            lambda x: max_pool_windows(x, 3),
            lambda x: nn.max_pool(x, (3, 3), strides=(3, 3)),
            distinct(2, 7, 9, 5),
        )


@pytest.mark.slow
@pytest.mark.parametrize("size", [(6, 8), (7, 1)])
def test_overlapping_windows_equal_flax(size, monkeypatch, fresh_traces):
    x = distinct(3, *size, 5)
    close(max_pool_3x3(x), numpy_max_3x3(x))
    check_same(max_pool_3x3, flax_max_3x3, x)
    check_same(relu_before(max_pool_3x3), relu_before(flax_max_3x3), x)
    monkeypatch.setattr(pooling, "_by_platform", lambda x, ops, *, cpu, elsewhere: elsewhere(x))
    check_same(lambda x: max_pool_3x3(x), flax_max_3x3, x)


def test_twin_shifted_overlapping_windows_fail(monkeypatch, fresh_traces):
    max_of_three = on_cpu.max_of_three
    monkeypatch.setattr(
        on_cpu, "max_of_three", lambda x, axis: max_of_three(jnp.roll(x, 1, axis), axis)
    )
    with pytest.raises(AssertionError):
        check_same(lambda x: max_pool_3x3(x), flax_max_3x3, distinct(3, 6, 8, 5))


@pytest.mark.medium
def test_ties_in_overlapping_windows_share_the_gradient():
    x = np.maximum(distinct(3, 6, 8, 5) - 0.3, 0)
    with pytest.raises(AssertionError):
        check_same(max_pool_3x3, flax_max_3x3, x)
    gradient = jax.grad(lambda x: max_pool_3x3(x).sum())(np.zeros((1, 2, 2, 1), np.float32))
    close(gradient, np.full((1, 2, 2, 1), 0.25))


@pytest.mark.parametrize(
    ("size", "out"),
    [((7, 7), (2, 2)), ((28, 28), (7, 7)), ((8, 8), (2, 2)), ((5, 9), (3, 2)), ((1, 3), (2, 2))],
)
def test_adaptive_average_equals_numpy(size, out):
    x = distinct(2, *size, 3)
    close(adaptive_avg_pool(x, out), numpy_adaptive(x.astype(np.float64), out))


def test_twin_adaptive_average_without_overlap_fails(monkeypatch, fresh_traces):
    def without_overlap(size, out):
        starts = [i * size // out for i in range(out + 1)]
        return np.array(
            [[(a <= j < b) / (b - a) for j in range(size)] for a, b in pairwise(starts)], np.float32
        )

    monkeypatch.setattr(pooling, "_averages", without_overlap)
    with pytest.raises(AssertionError):
        test_adaptive_average_equals_numpy((7, 7), (2, 2))


def test_averages_of_bfloat16_are_summed_in_float32():
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16) + (jnp.arange(64) % 2)[None, :, None, None].astype(
        jnp.bfloat16
    )
    y = adaptive_avg_pool(x, (1, 1))
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0, 0, 0]) == 1.5


def has_branch(f, x):
    compiled = jax.jit(jax.grad(lambda x: (f(x) ** 2).sum())).lower(x).compile().as_text()
    return "conditional" in compiled


@pytest.mark.parametrize("pool", [max_pool_2x2, max_pool_3x3, avg_3x2])
def test_program_has_one_branch_only(pool):
    assert not has_branch(pool, distinct(3, 6, 8, 5))


def test_twin_program_with_two_branches_is_detected():
    def branch(x):
        return jax.lax.cond(x[0, 0, 0, 0] > 0, lambda y: jnp.sort(y, 1), max_same, x)

    def max_same(x):
        return nn.max_pool(x, (2, 2), padding="SAME")

    assert has_branch(branch, distinct(3, 6, 8, 5))


@pytest.mark.parametrize("pool", [max_pool_2x2, max_pool_3x3, avg_3x2])
def test_each_platform_has_its_formulation(pool):
    def text(platform):
        traced = jax.jit(pool).trace(distinct(3, 6, 8, 5))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "reduce_window" not in text("cpu")
    assert "reduce_window" in text("cuda")
    assert "reduce_window" in text("tpu")


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="7x8"):
        max_pool_2x2(distinct(1, 7, 8, 2))


def test_annotated_shapes_refuse_wrong_arguments():
    checked = jaxtyped(typechecker=beartype)(max_pool_2x2)
    assert checked(jnp.ones((1, 4, 4, 2))).shape == (1, 2, 2, 2)
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        checked(jnp.ones((4, 4, 2)))
