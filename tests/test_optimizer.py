"""Tests of learning rates against values by hand, and of optimizers against NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.config import options
from dgl_jax.core.optimizer import make_optimizer, make_schedule

STEPS = 10  # per epoch


def rate(count, total=100, learning_rate=0.1, **settings):
    return float(make_schedule(options("schedule", **settings), learning_rate, STEPS, total)(count))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "constant"}, {0: 0.1, 1000: 0.1}),
        # The first update after epoch 2 is the 21st, with a count of 20.
        (
            {"name": "step", "boundaries": (2.0, 4.0), "factor": 0.2},
            {0: 0.1, 19: 0.1, 20: 0.02, 39: 0.02, 40: 0.004, 99: 0.004},
        ),
        ({"name": "step", "boundaries": (0.5,), "factor": 0.1}, {4: 0.1, 5: 0.01}),
        (
            {"name": "cosine"},
            {
                0: 0.1,
                25: 0.05 * (1 + math.sqrt(0.5)),
                50: 0.05,
                75: 0.05 * (1 - math.sqrt(0.5)),
                100: 0.0,
                120: 0.0,
            },
        ),
        ({"name": "constant", "warmup_epochs": 1.0}, {0: 0.01, 4: 0.05, 9: 0.1, 10: 0.1, 50: 0.1}),
        (
            {"name": "cosine", "warmup_epochs": 2.0},
            {0: 0.005, 9: 0.05, 19: 0.1, 20: 0.1, 60: 0.05, 100: 0.0},
        ),
        (
            {"name": "step", "boundaries": (1.0,), "factor": 0.5, "warmup_epochs": 2.0},
            {9: 0.05, 10: 0.0275, 19: 0.05, 20: 0.05},
        ),
    ],
)
def test_schedules_equal_values_by_hand(settings, expected):
    for count, value in expected.items():
        assert rate(count, **settings) == pytest.approx(value, rel=1e-5, abs=1e-8), count


def sgd(params, gradients, rates, momentum, decay, nesterov=False):
    """Computes SGD updates in NumPy.

    g' = g + decay p;  b = momentum b + g';  p = p - rate b, or, with Nesterov's momentum,
    p = p - rate (g' + momentum b).
    """
    buffer = np.zeros_like(params)
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + decay * params
        buffer = momentum * buffer + gradient
        params = params - rate * (gradient + momentum * buffer if nesterov else buffer)
    return params


def three_updates(settings, schedule, params, gradients):
    optimizer = make_optimizer(settings, schedule)
    params = {"w": jnp.asarray(params, jnp.float32)}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = {"w": params["w"] + updates["w"]}
    return np.asarray(params["w"])


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_numpy(momentum, nesterov, decay):
    random = np.random.default_rng(0)
    params, gradients = random.normal(size=(4, 3)), random.normal(size=(3, 4, 3))
    schedule = make_schedule(
        options("schedule", name="step", boundaries=(0.2,), factor=0.5), 0.1, STEPS, 100
    )
    settings = options(
        "optimizer",
        name="sgd",
        learning_rate=0.1,
        momentum=momentum,
        weight_decay=decay,
        nesterov=nesterov,
    )
    updated = three_updates(settings, schedule, params, gradients)
    np.testing.assert_allclose(
        updated,
        sgd(params, gradients, (0.1, 0.1, 0.05), momentum, decay, nesterov),
        rtol=1e-6,
        atol=1e-7,
    )
    for broken in (
        sgd(params, gradients, (0.1, 0.05, 0.05), momentum, decay, nesterov),
        sgd(params, gradients, (0.1, 0.1, 0.05), momentum + 0.01, decay, nesterov),
        sgd(params, gradients, (0.1, 0.1, 0.05), momentum, decay + 0.001, nesterov),
        sgd(params, gradients, (0.1, 0.1, 0.05), momentum or 0.5, decay, not nesterov),
    ):
        assert not np.allclose(updated, broken, rtol=1e-6, atol=1e-7)


def test_first_update_of_adam_equals_value_by_hand():
    # The first update is about the sign of the gradient: g' / (|g'| + 1e-8) with g' = g + decay p.
    params, gradient = np.array([1.0, -2.0, 0.5]), np.array([0.5, 0.1, -0.3])
    settings = options("optimizer", name="adam", learning_rate=0.01, weight_decay=0.1)
    updated = three_updates(settings, lambda count: 0.01, params, [gradient])
    decayed = gradient + 0.1 * params
    assert np.sign(decayed).tolist() != np.sign(gradient).tolist()
    expected = params - 0.01 * decayed / (np.abs(decayed) + 1e-8)
    np.testing.assert_allclose(updated, expected, rtol=1e-6)


def test_boundaries_that_round_to_the_same_step_multiply():
    schedule = make_schedule(
        options("schedule", name="step", boundaries=(1.0, 1.01), factor=0.1), 1.0, 10, 100
    )
    assert float(schedule(9)) == pytest.approx(1.0)
    assert float(schedule(10)) == pytest.approx(0.01)


def test_equal_settings_share_an_optimizer():
    """Programs are shared between runs whose specs are equal, optimizer included."""
    sgd = options("optimizer", name="sgd", learning_rate=0.1)
    assert make_optimizer(sgd) is make_optimizer(
        options("optimizer", name="sgd", learning_rate=0.1)
    )
    schedule = make_schedule(options("schedule", name="constant"), 0.1, 10, 100)
    assert make_optimizer(sgd, schedule) is make_optimizer(sgd, schedule)
    assert make_optimizer(sgd, schedule) is not make_optimizer(sgd)
