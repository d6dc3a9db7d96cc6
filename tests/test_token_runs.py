"""Tests of runs with one label per token (`examples/plugin/tokens.py`) under all engines."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import arrays, records
from token_runs import LENGTH, SYMBOLS, config, experiment

from dgl_jax.config import make_settings
from dgl_jax.core import rngs
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.profile.memory import module_memory
from dgl_jax.run.build import make_experiment
from dgl_jax.run.plots import plot
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.predict import predict_run
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("plugin_kinds")


def trained(steps: int, devices: int = 2, **fields: Any):
    built = experiment(devices, **fields)
    *_, last = built.engine.run(built.engine.init(), built.source, steps)
    return [jax.device_get(module.params) for module in last.snapshot().modules]


def furthest(one, other):
    return max(
        float(np.max(np.abs(a - b)))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


# Training


def by_hand(steps: int, hidden: float, shift: int = 0):
    """Trains two modules on tokens in plain JAX; a `shift` of the labels simulates a bug."""
    built = experiment(task__hidden=hidden)
    params = [state.params for state in built.spec.init()]
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))
    opt_states = [optimizer.init(p) for p in params]
    data, order = built.source._stored["train"], built.source._order

    def features_of(p, blocks, x):
        for number, block in blocks:
            x = block.apply({"params": p["body"][f"block_{number}"]}, x, train=True)
        return x

    def loss_of(p, blocks, x, label):
        features = features_of(p, blocks, x)
        logits = features @ p["objective"]["Dense_0"]["kernel"] + p["objective"]["Dense_0"]["bias"]
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits), label[..., None], -1
        ).mean(), features

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    for number in range(steps):
        ids = order.training(number)
        label = np.roll(data.labels[ids], shift, axis=1)
        is_hidden = jax.random.bernoulli(
            rngs.augmentation(rngs.root(0), number), hidden, (len(ids), LENGTH)
        )
        x = jnp.where(is_hidden, SYMBOLS, data.inputs[ids])
        for k, module in enumerate(built.spec.modules):
            blocks = tuple(enumerate(module.blocks, module.first))
            (_, x), gradient = step(params[k], blocks, x, label)
            updates, opt_states[k] = optimizer.update(gradient, opt_states[k], params[k])
            params[k] = optax.apply_updates(params[k], updates)
    return params


@pytest.mark.medium
@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_token_labels_equal_plain_jax_loop(engine):
    params = trained(3, task__hidden=0.25, engine__name=engine)
    assert furthest(params, by_hand(3, 0.25)) < 1e-5
    assert furthest(params, by_hand(3, 0.25, shift=1)) > 1e-4, "shifted labels have no effect"
    assert furthest(params, by_hand(3, 0.0)) > 1e-4, "hiding tokens has no effect"


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize(
    "fields", [{}, {"model__remat": True, "train__accumulate": 2}, {"codec__name": "bf16"}]
)
def test_synchronous_engines_agree_bit_for_bit(fields):
    one, other = (
        trained(4, count, engine__name=name, **fields)
        for name, count in (("fused", 1), ("pipeline", 2))
    )
    assert furthest(one, other) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulated", "threads"])
def test_asynchronous_engines_pass_token_labels_through_rings(engine, tmp_path):
    summary = train_and_evaluate(config(engine__name=engine, replay__size=3), tmp_path)
    assert [module["updates"] for module in summary.modules] == [12, 12]
    assert all(0 <= module["test_accuracy"] <= 1 for module in summary.modules)


@pytest.mark.slow
def test_second_module_learns_sums_outside_the_receptive_field_of_the_first(tmp_path):
    fields = {
        "train__steps": 600,
        "data__batch_size": 64,
        "data__train_examples": 0,
        "model__width": 32,
        "model__modules": 4,
    }
    summary = train_and_evaluate(
        config(**fields, eval__every=0, checkpoint__every=0, optimizer__learning_rate=0.1), tmp_path
    )
    accuracies = [module["test_accuracy"] for module in summary.modules]
    assert accuracies[0] < 0.3
    assert min(accuracies[1:]) > 0.85


# A whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tokens") / "run"
    return workdir, train_and_evaluate(
        config(task__hidden=0.1, data__validation_fraction=0.1, codec__name="bf16"), workdir
    )


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(run, tmp_path):
    fields = {"task__hidden": 0.1, "data__validation_fraction": 0.1, "codec__name": "bf16"}
    train_and_evaluate(config(**fields, train__steps=4), tmp_path)
    train_and_evaluate(config(**fields), tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(run[0]), arrays(tmp_path), strict=True))
    train_and_evaluate(config(**fields | {"task__hidden": 0.2}), tmp_path / "other")
    assert any(not np.array_equal(a, b) for a, b in zip(arrays(run[0]), arrays(tmp_path / "other")))
    with pytest.raises(UserError, match=r"config\.task\.hidden \(was 0\.1, is now 0\.2\)"):
        train_and_evaluate(config(**fields | {"task__hidden": 0.2}), tmp_path)


@pytest.mark.medium
def test_accuracies_count_tokens_and_equal_numpy(run):
    """Checks accuracies on 500 sequences in batches of 8, so that the last batch is padded."""
    workdir, summary = run
    network = load_exported(export_run(workdir))
    source = make_experiment(make_settings(config()), jax.devices()[:1]).source
    stored = source._stored["test"]
    logits = network.logits(stored.inputs)
    assert [answer.shape for answer in logits] == [(500, LENGTH, SYMBOLS)] * 2
    correct = [np.asarray(answer).argmax(-1) == stored.labels for answer in logits]
    metrics = evaluate_run(workdir)
    for k, module_correct in enumerate(correct):
        assert metrics[f"test/module_{k}/accuracy"] == pytest.approx(
            module_correct.sum() / (500 * LENGTH), abs=1e-9
        )
        log_odds = np.asarray(jax.nn.log_softmax(logits[k]), np.float64)
        nats = -np.take_along_axis(log_odds, stored.labels[..., None], -1).mean()
        assert metrics[f"test/module_{k}/loss"] == pytest.approx(nats, rel=1e-5)
        assert module_correct.all(1).mean() < metrics[f"test/module_{k}/accuracy"], (
            "accuracy counts whole sequences instead of tokens"
        )
    odds = [np.asarray(jax.nn.softmax(answer), np.float64) for answer in logits]
    expected = ((odds[0] + 2 * odds[1]).argmax(-1) == stored.labels).mean()
    assert metrics["test/ensemble/accuracy"] == pytest.approx(expected, abs=2 / (500 * LENGTH))
    assert metrics["test/ensemble/accuracy"] == pytest.approx(summary.ensemble_accuracy)
    assert "test/ensemble/loss" not in metrics
    assert [record for record in records(workdir) if "validation/module_1/accuracy" in record]


@pytest.mark.medium
def test_plots_of_a_token_run_are_drawn(run):
    assert {path.name for path in plot(run[0])} >= {"accuracy.png", "loss.png"}


@pytest.mark.medium
def test_predict_refuses_tasks_other_than_images(run):
    with pytest.raises(
        UserError,
        match=r"^config\.task\.name=token_labels: --mode=predict reads images; --mode=export",
    ):
        predict_run(run[0], "newest", ["nowhere"], None)


def test_traffic_counts_one_label_per_token():
    spec = experiment().spec
    assert spec.inputs() == jax.ShapeDtypeStruct((8, LENGTH), np.int32)
    assert spec.context(1)["label"].shape == (8, LENGTH)
    assert spec.traffic().wire == (LENGTH * 16 * 4 + LENGTH * 4 + 4,)
    assert module_memory(spec)[0].message == 8 * (2 * LENGTH * 4 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["flops", "time"])
def test_token_network_is_split_by_cost(split):
    assert experiment(model__split=split).spec.modules[0].first == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"objective__name": "auglocal", "objective__widen": 2.0},
            r"auxiliary block 0 \(Mix\) cannot follow .*widen=1\.0 or .* may fit",
        ),
        ({"objective__context_input": True}, "config.objective.context_input: .*; use False"),
    ],
)
def test_objectives_that_do_not_fit_tokens_are_refused(fields, words):
    with pytest.raises(UserError, match=words) as error:
        experiment(1, **fields)
    assert "\n" not in str(error.value)
