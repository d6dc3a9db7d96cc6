"""The bound of the convergence theorem on a problem whose constants are all known; see linear.py.

The theorem (Belilovsky et al. 2020, section 4): while the inputs of a module settle, with the
distance c_t between their distribution at update t and the final one,

    sum eta_t |grad L(t)|^2 <= L(0) - L(T) + G sum eta_t (sqrt(2 c_t) + Lambda eta_t / 2)
"""

from functools import cache

import jax
import numpy as np
import optax
import pytest
from linear import (
    BATCH,
    POINTS,
    TARGET,
    Gaussian,
    Grid,
    Law,
    begin,
    bound,
    constant_producer,
    fused,
    make_spec,
    replayed,
    robbins_monro,
    settled,
    simulated,
    train,
)

from dgl_jax.diagnostics import Parts, probe
from dgl_jax.types import Message

STEPS, QUANTUM = 200, 0.5
START = (np.array([-0.5, 1.0, 1.0]), 1.3, 0.7)
RATE = robbins_monro(0.3)
RATES = np.asarray(RATE(np.arange(STEPS)), np.float64)
RUNS = {
    "fused": None,
    "fused,grid": None,
    "S=1,M=1": (1.0, 1),
    "S=1.2,M=10": (1.2, 10),
    "S=2,M=10": (2.0, 10),
    "S=4,M=50": (4.0, 50),
}


@cache
def run(name, seed=0):
    """Returns the trajectory of a run with step sizes that satisfy Robbins and Monro."""
    spec = make_spec(
        3 if name == "fused" else 2, optax.sgd(RATE), Grid(QUANTUM) if "grid" in name else None
    )
    engine = simulated(spec, STEPS, *RUNS[name]) if RUNS[name] else fused(spec)
    return train(engine, START[: len(spec.modules)], STEPS, seed)


def bound_of(trajectory, rates, quantum=0.0):
    """Returns the bound for module 1, whose final inputs come from the optimal module 0."""
    a = trajectory.params[0]
    laws = [Law.behind(a[min(n, len(a) - 1)], quantum=quantum) for n in trajectory.numbers[1]]
    return bound(trajectory.params[1], laws, Law.behind(settled(), quantum=quantum), rates)


@pytest.mark.medium
@pytest.mark.parametrize("quantum", [0.0, QUANTUM])
def test_closed_forms_equal_integrals(quantum):
    x = np.linspace(-25, 25, 2_000_001)
    values = np.round(x / quantum) * quantum if quantum else x
    laws, densities = [Law(0.7, 0.9, quantum), Law(1.1, 1.4, quantum), Law(0.7, 1.2, quantum)], []
    for law in laws:
        density = np.exp(-(((x - law.mean) / law.deviation) ** 2) / 2)
        density /= law.deviation * np.sqrt(2 * np.pi)
        densities.append(density)

        def mean(f, density=density):
            return np.trapezoid(f * density, x)

        for order in (1, 2, 3, 4):
            assert law.moment(order) == pytest.approx(mean(values**order), abs=1e-6)
        for theta in (-0.4, 1.3):
            residual = theta * values - TARGET
            assert law.loss(theta) == pytest.approx(mean(residual**2 / 2), abs=1e-6)
            assert law.gradient(theta) == pytest.approx(mean(residual * values), abs=1e-6)
            second = mean((residual * values) ** 2)
            assert law.second_moment(theta) == pytest.approx(second, abs=1e-6)
    for other, density in zip(laws[1:], densities[1:]):
        gap = densities[0] - density
        if quantum:
            numbers = np.round(x / quantum).astype(int) - POINTS[0]
            distance = np.abs(np.bincount(numbers, gap)).sum() * (x[1] - x[0])
        else:
            distance = np.trapezoid(np.abs(gap), x)
        assert laws[0].distance(other) == pytest.approx(distance, abs=1e-5 if quantum else 1e-6)
        assert other.distance(laws[0]) == pytest.approx(laws[0].distance(other), abs=1e-12)
    assert laws[0].distance(laws[0]) == 0


def test_rounding_lowers_the_distance():
    one, other = Law(0.7, 0.9), Law(1.1, 1.4)
    rounded = Law(0.7, 0.9, QUANTUM).distance(Law(1.1, 1.4, QUANTUM))
    assert 0.9 * one.distance(other) < rounded < one.distance(other)


@pytest.mark.medium
@pytest.mark.parametrize("name", RUNS)
def test_training_equals_numpy(name):
    trajectory = run(name)
    computed = replayed(trajectory, RATES, 0, QUANTUM if "grid" in name else 0.0)
    for k in (0, 1):
        assert trajectory.params[k].shape == computed[k].shape == (STEPS + 1, 3 - 2 * k)
        np.testing.assert_allclose(trajectory.params[k], computed[k], rtol=0, atol=1e-6)
    if name == "S=2,M=10":  # the twin: not the batches that module 1 has read
        other = trajectory._replace(numbers=[trajectory.numbers[0]] * 2)
        assert np.abs(replayed(other, RATES, 0)[1] - trajectory.params[1]).max() > 1e-2


@pytest.mark.medium
@pytest.mark.parametrize("name", RUNS)
def test_bound_holds_at_every_step(name):
    for seed in (0, 1):
        result = bound_of(run(name, seed), RATES, QUANTUM if "grid" in name else 0.0)
        assert np.all(result.left <= result.right)
        assert np.all(result.smallest <= result.right / result.rates)
        per_rate = result.right / result.rates / result.most
        # The gradients are at most G anyway: the bound says more, and more with every step.
        assert per_rate[-1] < 0.5
        assert per_rate[-1] < 0.78 * per_rate[STEPS // 4]
        assert result.smallest[-1] < 1e-5


def test_bound_holds_for_the_third_module():
    params = run("fused").params
    final = Law.behind(settled(), Law.behind(settled()).optimum())
    laws = [Law.behind(a, float(theta[0])) for a, theta in zip(params[0], params[1])]
    result = bound(params[2], laws[:STEPS], final, RATES)
    assert np.all(result.left <= result.right)
    assert result.right[-1] / result.rates[-1] < 0.6 * result.most


def test_twin_bound_without_drift_fails():
    rate = robbins_monro(0.01)
    spec = make_spec(2, constant_producer(rate, 0.001))
    slow = train(fused(spec), (np.array([2.0, 0.0, 0.0]), 1.0), 60, 0)
    result = bound_of(slow, np.asarray(rate(np.arange(60)), np.float64))
    assert np.all(result.left <= result.right)
    assert np.any(result.left > result.without_drift)


def test_twin_producer_that_never_settles_keeps_bound_and_gradient_large():
    spec = make_spec(2, constant_producer(RATE, 0.7))
    result = bound_of(train(fused(spec), START[:2], STEPS, 0), RATES)
    per_rate = result.right / result.rates / result.most
    assert per_rate[-1] > 0.85 * per_rate[STEPS // 4]
    assert per_rate[-1] > 0.7
    assert result.smallest[-1] > 1e-3


def test_twin_constant_steps_leave_a_floor():
    spec = make_spec(2, optax.sgd(0.3))
    result = bound_of(train(fused(spec), START[:2], STEPS, 0), np.full(STEPS, 0.3))
    assert np.all(result.left <= result.right)
    settling = bound_of(run("S=1,M=1"), RATES)
    noise, other = (
        (b.without_drift[-1] - b.without_drift[STEPS // 4]) / (b.rates[-1] - b.rates[STEPS // 4])
        for b in (result, settling)
    )
    floor = result.most * Law.behind(settled()).moment(2) * 0.3 / 2
    assert noise == pytest.approx(floor, rel=0.02)
    assert other < 0.2 * floor


def test_twin_too_large_steps_make_the_bound_empty():
    size = 3.5  # stable steps are below 2 / Lambda
    assert size > 2 / Law.behind(settled()).moment(2)
    spec = make_spec(2, constant_producer(lambda count: size, 0.1))
    result = bound_of(train(fused(spec), START[:2], 40, 0), np.full(40, size))
    assert np.all(result.right / result.rates >= result.most)
    assert np.all(result.smallest > 1e-2)
    # With the constant G of the first update it does not hold.
    first = Law.behind(START[0]).second_moment(START[1])
    assert np.any(result.left > result.right * first / result.most)


def test_error_of_the_grid_is_the_known_one():
    trajectory = run("fused,grid")
    law = Law.behind(trajectory.params[0][-1], quantum=QUANTUM)
    z = np.linspace(-10, 10, 400_001)
    density = np.exp(-(((z - law.mean) / law.deviation) ** 2) / 2)
    error = (np.round(z / QUANTUM) * QUANTUM - z) ** 2
    expected = np.sqrt(np.sum(error * density) / np.sum(z**2 * density))
    measured = [metrics["codec_error"] for metrics in trajectory.metrics[0][-100:]]
    assert np.mean(measured) == pytest.approx(expected, rel=0.05)
    assert expected == pytest.approx(
        QUANTUM / np.sqrt(12 * Law.behind(settled()).moment(2)), rel=0.1
    )


@pytest.mark.parametrize("quantum", [0.0, QUANTUM])
def test_probe_equals_numpy(quantum):
    spec = make_spec(2, optax.sgd(0.1), Grid(quantum) if quantum else None)
    state, batch = begin(spec, START[:2]), Gaussian(3).batch(0)
    parts = [Parts.of(module) for module in state.modules]
    below = jax.jit(lambda p: probe(spec, 0, 4, False, False, p, batch.inputs, batch.context))(
        parts[0]
    )
    probed = probe(spec, 1, 4, False, False, parts[1], Message(below.payload), below.context)
    x = batch.inputs.astype(np.float64)
    z = x @ START[0]
    sent = np.round(z / quantum) * quantum if quantum else z
    gradients = np.mean((z - TARGET)[:, None] * x, axis=0), np.mean((1.3 * sent - TARGET) * sent)
    for gradient, expected in zip((below.gradient, probed.gradient), gradients):
        (values,) = jax.tree.leaves(gradient)
        np.testing.assert_allclose(values, np.atleast_1d(expected), rtol=1e-6, atol=1e-6)
    assert probed.inputs.shape == (BATCH, 4)
    slopes = np.linalg.lstsq(sent[:, None], np.asarray(probed.inputs))[0]
    np.testing.assert_allclose(probed.inputs, sent[:, None] * slopes, rtol=1e-5, atol=1e-6)
    if quantum:
        error = np.linalg.norm(sent - z) / np.linalg.norm(z)
        assert float(below.codec_error) == pytest.approx(error, rel=1e-5)
    else:
        assert below.codec_error is None
