"""Tests of deep supervision: its gradient, its limits `weight` = 0 and K = 1, and its options."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plugin_runs import MIRROR, config, furthest
from runs import small_config

from dgl_jax import testing
from dgl_jax.config import make_settings
from dgl_jax.engines import FusedEngine
from dgl_jax.engines.placement import one_group
from dgl_jax.errors import UserError
from dgl_jax.methods.deep_supervision import DeepSupervision
from dgl_jax.run.build import make_experiment
from dgl_jax.train import train_and_evaluate

WEIGHT = 0.3


def new_engine(spec, **changes: Any) -> FusedEngine:
    spec = dataclasses.replace(spec, **changes)
    return FusedEngine(spec, one_group(jax.devices()[:1], len(spec.modules)))


def gradient_of_a_step(tiny, **changes: Any) -> list[Any]:
    """Returns the gradient that each module applies in the first step."""
    engine = new_engine(tiny.spec(3), method=DeepSupervision(WEIGHT), **changes)
    before = [state.params for state in tiny.init(engine.spec)]
    after = [state.params for state in tiny.run(engine, 1)[0]]
    return jax.tree.map(lambda old, new: old - new, before, after)


def written_out(tiny, part: slice = slice(None), weight: float = WEIGHT, cut: bool = False):
    """Returns the gradient of the written-out sum of losses on a part of the first batch."""
    spec, batch = tiny.spec(3), tiny.source.batch(0)
    inputs, label = spec.task.evaluate(batch.inputs)[part], batch.context["label"][part]
    states = tiny.init(spec)

    def apply(layer, params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    def total(params):
        x, losses = inputs, []
        for module, p, state in zip(spec.modules, params, states):
            for n, block in enumerate(module.blocks, module.first):
                name = f"block_{n}"
                x = apply(block, p["body"][name], state.batch_stats["body"][name], x)
            logits = apply(module.objective.head, p["objective"], {}, x)
            rows = jax.nn.log_softmax(logits)[np.arange(len(label)), label]
            losses.append(-rows.mean())
            x = jax.lax.stop_gradient(x) if cut else x
        return losses[2] + weight * (losses[0] + losses[1])

    return jax.jit(jax.grad(total))([jax.tree.map(jnp.asarray, s.params) for s in states])


@pytest.mark.medium
def test_gradient_is_that_of_the_sum_of_all_losses(tiny):
    applied = gradient_of_a_step(tiny, optimizer=optax.sgd(1.0))
    assert furthest(applied, written_out(tiny)) < 1e-6
    assert furthest(applied, written_out(tiny, weight=0.0)) > 1e-3
    assert furthest(applied, written_out(tiny, cut=True)) > 1e-3


@pytest.mark.medium
def test_accumulated_gradient_is_the_mean_over_micro_batches(tiny):
    applied = gradient_of_a_step(tiny, optimizer=optax.sgd(1.0), accumulate=2)
    parts = [written_out(tiny, slice(i, None, 2)) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    assert furthest(applied, mean) < 1e-6
    assert furthest(applied, parts[0]) > 1e-3


@pytest.mark.medium
def test_without_weight_the_bodies_equal_those_of_backprop(tiny):
    def bodies(engine):
        return [state.params["body"] for state in tiny.run(engine, 3)[0]]

    expected = bodies(tiny.engine("backprop"))
    assert furthest(bodies(new_engine(tiny.spec(3), method=DeepSupervision(0.0))), expected) < 1e-6
    weighted = bodies(new_engine(tiny.spec(3), method=DeepSupervision(WEIGHT)))
    assert furthest(weighted, expected) > 1e-3


def test_average_for_evaluation_changes_no_parameters(tiny):
    plain = new_engine(tiny.spec(3), method=DeepSupervision(WEIGHT))
    averaged = dataclasses.replace(plain.spec, ema=0.5)
    states, _ = tiny.run(plain, 1)
    with_average, _ = tiny.run(new_engine(averaged), 1)
    assert furthest([s.params for s in states], [s.params for s in with_average]) == 0
    for state in with_average:  # after one update the average is the new value
        assert furthest(state.extras["ema"]["params"], state.params) < 1e-6


@pytest.mark.medium
def test_every_module_reports_its_loss_and_predicts(tmp_path):
    fields = {"method__name": "deep_supervision", "train__steps": 6, "checkpoint__every": 0}
    summary = train_and_evaluate(small_config(**fields), tmp_path)
    assert all(0 <= module["test_accuracy"] <= 1 for module in summary.modules)
    text = (tmp_path / "metrics.jsonl").read_text()
    for name in ("train/module_0/loss", "train/module_1/loss", "test/ensemble/accuracy"):
        assert name in text


@pytest.mark.full_compile
@pytest.mark.slow
def test_deep_supervision_passes_the_checks_of_testing():
    testing.check_method("deep_supervision")


def test_pipeline_is_refused():
    settings = make_settings(
        small_config(method__name="deep_supervision", engine__name="pipeline").to_dict()
    )
    with pytest.raises(UserError, match="deep_supervision runs under fused"):
        make_experiment(settings, jax.devices()[:2])


@pytest.mark.usefixtures("plugin_kinds")
def test_objectives_that_read_the_next_module_are_refused(tmp_path):
    with pytest.raises(UserError, match="deep_supervision: its objectives cannot read"):
        train_and_evaluate(config(method__name="deep_supervision", **MIRROR), tmp_path / "run")
    assert not (tmp_path / "run").exists()
