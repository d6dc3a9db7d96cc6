"""User-defined method with messages that travel down, and whole runs of parts that span modules."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plugin_runs import ECHO, MIRROR, ByHand, config, equal, furthest, head_loss, trained
from runs import arrays, records

from dgl_jax import testing
from dgl_jax.config import make_settings
from dgl_jax.engines import FusedEngine
from dgl_jax.evaluate import evaluate_run
from dgl_jax.run.build import make_experiment
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.plan import plan
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("plugin_kinds")

REPLAYED: dict[str, Any] = {"method__name": "replayed", "model__modules": 3}


# A method whose gradients travel down as messages


def replayed_by_hand(steps: int) -> list[Any]:
    hand = ByHand(**REPLAYED)
    last = len(hand.modules) - 1
    inputs: list[dict[int, Any]] = [{} for _ in range(last)]
    gradients: list[dict[int, Any]] = [{} for _ in range(last)]

    def loss_of(p, x, s, label):
        features, body = hand.modules[last].apply_body(p, s, x, train=True)
        loss, head_stats = head_loss(
            hand.modules[last], p["objective"], s["objective"], features, label
        )
        return loss, {"body": body, "objective": head_stats}

    body = jax.jit(
        lambda k, p, s, x: hand.modules[k].apply_body(p, s, x, train=True), static_argnums=0
    )
    step = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))
    for tick in range(steps + last):
        for k in range(last):
            if 0 <= (number := tick - (last - k)) < steps:
                x, cotangent = inputs[k].pop(number), gradients[k].pop(number)
                _, pull = jax.vjp(
                    lambda p, x, k=k: body(k, p, hand.stats[k], x)[0], hand.params[k], x
                )
                gradient, down = pull(cotangent)
                hand.update(k, gradient)
                if k:
                    gradients[k - 1][number] = down
        if tick < steps:
            x, label = hand.batch(tick)
            for k in range(last):
                inputs[k][tick] = x
                x, body_stats = body(k, hand.params[k], hand.stats[k], x)
                hand.stats[k] = {"body": body_stats}
            (_, hand.stats[last]), (gradient, gradients[last - 1][tick]) = step(
                hand.params[last], x, hand.stats[last], label
            )
            hand.update(last, gradient)
    return hand.params


@pytest.mark.medium
@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_replayed_features_equal_plain_jax_loop(engine):
    params = trained(
        4, devices=3 if engine == "pipeline" else 1, engine__name=engine, train__steps=4, **REPLAYED
    )
    assert furthest(params, replayed_by_hand(4)) < 1e-5
    not_delayed = trained(4, devices=1, method__name="backprop", model__modules=3, train__steps=4)
    assert furthest(params, not_delayed) > 1e-4, "the delay of the gradients has no effect"


@pytest.mark.medium
def test_replayed_features_run_in_dispatches_of_many_steps():
    """Checks a method that fills the pipeline with other turns, which are dispatched singly."""
    fields = REPLAYED | {"train__steps": 12}
    one = trained(12, devices=1, **fields)
    many = trained(12, devices=1, engine__steps_per_dispatch=3, **fields)
    assert furthest(many, one) < 1e-5
    # Twin: the parameters of one step earlier.
    assert furthest(trained(11, devices=1, **fields), one) > 1e-3


def gradients_of_the_last_batch(method: str, steps: int) -> list[Any]:
    """Returns the gradient of each module on its last batch, with parameters that never change."""
    experiment = make_experiment(
        make_settings(config(method__name=method, model__modules=3, train__steps=steps)),
        jax.devices()[:1],
    )
    # Stores the gradients as its state and returns zero updates.
    recorder = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p),
        lambda g, _, p: (jax.tree.map(jnp.zeros_like, p), g),
    )
    engine = FusedEngine(
        dataclasses.replace(experiment.spec, optimizer=recorder),
        experiment.engine.placement,
        total_steps=steps,
    )
    *_, last = engine.run(engine.init(), experiment.source, steps)
    return [jax.device_get(module.opt_state) for module in last.snapshot().modules]


@pytest.mark.medium
def test_delayed_gradients_equal_backprop_on_the_same_batch():
    delayed = gradients_of_the_last_batch("replayed", 4)
    expected = gradients_of_the_last_batch("backprop", 4)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-3
    assert furthest(delayed, expected) < 1e-5
    assert furthest(delayed, gradients_of_the_last_batch("backprop", 3)) > 1e-4, (
        "the gradients of another batch are the same"
    )


@pytest.mark.full_compile
@pytest.mark.slow
def test_replayed_method_passes_the_checks_of_testing():
    testing.check_method("replayed")


def test_plan_of_replayed_features_follows_its_schedule():
    report, spans = plan(make_settings(config(**REPLAYED)), stated="3,3,3,3")
    assert {(span.module, span.batch) for span in spans} >= {
        (k, b) for k in range(3) for b in range(4)
    }
    assert report["peak_memory_bytes"] == [None] * 3
    assert 0 < report["speedup"] < 3


# Whole runs


@pytest.mark.slow
@pytest.mark.full_compile
def test_synchronous_engines_agree_bit_for_bit():
    devices = {"fused": 1, "pipeline": 2, "serial": 1}
    params = {
        name: trained(6, count, engine__name=name, **MIRROR, **ECHO)
        for name, count in devices.items()
    }
    assert equal(params["fused"], params["pipeline"])
    assert equal(params["fused"], params["serial"])


@pytest.mark.slow
@pytest.mark.full_compile
def test_simulated_ordered_turns_equal_fused_with_a_mirror():
    ordered = {"engine__name": "simulated", "engine__order": "ordered", "replay__size": 1}
    assert equal(trained(6, 1, **ordered, **MIRROR), trained(6, 1, **MIRROR))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [MIRROR | ECHO, REPLAYED], ids=["mirror and echo", "replayed"])
def test_run_resumes_exactly_evaluates_and_exports(fields, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_and_evaluate(config(**fields, checkpoint__every=5, checkpoint__keep=9), whole)
    _copy_killed_run(whole, part, last=5)
    train_and_evaluate(config(**fields, checkpoint__every=5, checkpoint__keep=9), part)
    assert equal(arrays(whole), arrays(part))
    assert all(np.isfinite(record.get("train/module_1/loss", 0.0)) for record in records(whole))
    assert evaluate_run(whole)["step"] == 12
    logits = load_exported(export_run(whole)).logits(np.zeros((2, 8, 8, 1), np.uint8))
    assert logits[-1].shape == (2, 8)


def _copy_killed_run(whole: Path, part: Path, last: int) -> None:
    """Copies a run as if it had been killed some steps after the checkpoint of step `last`."""
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    for checkpoint in (part / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > last:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_finished_run_of_replayed_features_can_be_extended(tmp_path):
    train_and_evaluate(config(**REPLAYED, train__steps=5), tmp_path)
    summary = train_and_evaluate(config(**REPLAYED, train__steps=9), tmp_path)
    assert [module["updates"] for module in summary.modules] == [9, 9, 9]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulated", "threads"])
def test_asynchronous_engines_deliver_publications_and_images(engine, tmp_path):
    fields = (
        {"replay__size": 3, "checkpoint__every": 4, "checkpoint__keep": 9, "engine__name": engine}
        | MIRROR
        | ECHO
    )
    whole, part = tmp_path / "whole", tmp_path / "part"
    summary = train_and_evaluate(config(**fields), whole)
    assert [module["updates"] for module in summary.modules] == [12, 12]
    if engine == "simulated":
        _copy_killed_run(whole, part, last=4)
        train_and_evaluate(config(**fields), part)
        assert equal(arrays(whole), arrays(part))
