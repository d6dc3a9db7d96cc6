"""Objectives that read values sown inside the blocks of their module."""

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgl_jax import engines, models, testing
from dgl_jax.config import registry
from dgl_jax.core.module import LocalModule, init_states
from dgl_jax.core.step import eval_step, local_step
from dgl_jax.objectives import Objective, ObjectiveKind, classification, cross_entropy

RATE, WEIGHT = 0.1, 0.5
OPTIMIZER = optax.sgd(RATE)
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
LABEL = jnp.asarray([0, 1, 2, 0, 1, 2], jnp.int32)


class Sowing(nn.Module):
    """Linear layer with batch norm and a ReLU, which sows what enters the ReLU."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.features)(x))
        self.sow("intermediates", "before_relu", x)
        return nn.relu(x)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x.reshape(len(x), -1))


class Penalty(Objective):
    """Cross entropy plus a penalty on what the blocks sow."""

    head: nn.Module

    reads: ClassVar[tuple[str, ...]] = ("intermediates",)

    def __call__(self, features, context, published, train):
        local = classification(self.head(features, train), context["label"])
        sown = jax.tree.leaves(published.get("intermediates", {}))
        return local._replace(loss=local.loss + WEIGHT * sum(jnp.mean(x**2) for x in sown))

    def predict(self, features, published, train):
        first, *_ = jax.tree.leaves(published.get("intermediates", {})) or [0.0]
        return self.head(features, train) + jnp.sum(first)


def module(**fields: Any) -> LocalModule:
    return LocalModule("module_1", 4, (Sowing(7), Sowing(4)), Penalty(Linear()), **fields)


@pytest.fixture(scope="module")
def state():
    shape = jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype)
    return init_states([module()], OPTIMIZER, jax.random.key(0), shape)[0]


def normalized(x):
    """Returns batch-normalized x, with the scale and shift that a fresh layer has."""
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


def loss_by_hand(params):
    body, head = params["body"], params["objective"]["head"]["Dense_0"]
    x, penalty = INPUTS, 0.0
    for name in ("block_4", "block_5"):
        dense = body[name]["Dense_0"]
        x = normalized(x @ dense["kernel"] + dense["bias"])
        penalty += jnp.mean(x**2)
        x = jax.nn.relu(x)
    return cross_entropy(x @ head["kernel"] + head["bias"], LABEL) + WEIGHT * penalty


@pytest.mark.medium
@pytest.mark.parametrize("ops", ["auto", "xla"])
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_flow_through_sown_values(state, remat, ops):
    step = jax.jit(partial(local_step, module(remat=remat, ops=ops), OPTIMIZER))
    new, _, _ = step(state, INPUTS, {"label": LABEL})
    gradient = jax.grad(loss_by_hand)(state.params)
    for name in ("block_4", "block_5"):
        kernel, slope = (
            tree["body"][name]["Dense_0"]["kernel"] for tree in (state.params, gradient)
        )
        updated = new.params["body"][name]["Dense_0"]["kernel"]
        np.testing.assert_allclose(updated, kernel - RATE * slope, rtol=1e-4, atol=1e-6)
    before, after = (s.batch_stats["body"]["block_4"] for s in (state, new))
    assert not np.array_equal(*(jax.tree.leaves(stats)[0] for stats in (before, after)))


@pytest.mark.medium
def test_twin_the_penalty_moves_the_parameters(state, monkeypatch):
    with_penalty = local_step(module(), OPTIMIZER, state, INPUTS, {"label": LABEL})[0]
    monkeypatch.setattr(Penalty, "reads", ())
    without = local_step(module(), OPTIMIZER, state, INPUTS, {"label": LABEL})[0]
    kernels = (s.params["body"]["block_4"]["BatchNorm_0"]["scale"] for s in (with_penalty, without))
    assert not np.allclose(*kernels, rtol=1e-3)


def test_predictions_read_sown_values(state):
    outputs, predictions = eval_step(module(), state.params, state.batch_stats, INPUTS)
    head = state.params["objective"]["head"]["Dense_0"]
    first = INPUTS @ state.params["body"]["block_4"]["Dense_0"]["kernel"] / np.sqrt(1 + 1e-5)
    expected = outputs @ head["kernel"] + head["bias"] + first.sum()
    np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("engine", list(engines.ENGINES))
def test_engines_train_an_objective_that_reads_sown_values(engine, monkeypatch):
    for known in (registry.NETWORKS, registry.OBJECTIVES):
        monkeypatch.setattr(known, "_kinds", dict(known._kinds))
    models.register_network(
        "sowing", lambda width, classes, dtype: [Sowing(width, dtype) for _ in range(4)]
    )
    kind = ObjectiveKind(lambda options, inputs: Penalty(inputs.head))
    registry.OBJECTIVES.register("penalty", kind)
    groups = {"model": {"name": "sowing"}, "objective": {"name": "penalty"}}
    testing.check_engine(engine, **groups)
    testing.check_objective(**groups)
