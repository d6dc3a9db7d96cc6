"""Tasks: one label per token (`examples/plugin/tokens.py`) under all engines, and refused ones."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import arrays, records, small_config

from dgl_jax.config import default_config, make_settings
from dgl_jax.core import rngs
from dgl_jax.data import ArraySource, DataSet, Examples
from dgl_jax.data.source import stratified
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.export import export_run, load_exported
from dgl_jax.objectives import cross_entropy
from dgl_jax.profile.memory import module_memory
from dgl_jax.registry import DATA_SETS, TASKS
from dgl_jax.run.build import make_experiment
from dgl_jax.run.plots import plot
from dgl_jax.tasks import ImageClassification, Task, TaskInputs, augment_key
from dgl_jax.tools.plan import plan_run
from dgl_jax.tools.predict import predict_run
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import PADDING

pytestmark = pytest.mark.usefixtures("plugin_kinds")

TOKENS = {
    "data__name": "token_sums",
    "task__name": "token_labels",
    "model__name": "token_conv",
    "model__head": "each_token",
}
LENGTH, SYMBOLS = 16, 8


def config(**fields: Any) -> Any:
    """Returns the configuration of the small run on tokens, with `fields` set."""
    token_config = default_config(("examples.plugin",))
    token_config.update(small_config().to_dict() | {"plugins": token_config.plugins})
    token_config.data.augment, token_config.data.image_size = "none", 0
    for name, value in (TOKENS | {"model__width": 16} | fields).items():
        group, _, leaf = name.partition("__")
        setattr(token_config[group], leaf, value)
    return token_config


def experiment(devices: int = 1, **fields: Any):
    return make_experiment(make_settings(config(**fields)), jax.devices()[:devices])


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


def test_plots_of_a_token_run_are_drawn(run):
    assert {path.name for path in plot(run[0])} >= {"accuracy.png", "loss.png"}


def test_predict_refuses_tasks_other_than_images(run):
    with pytest.raises(
        UserError,
        match=r"^config\.task\.name=token_labels: --mode=predict reads images; --mode=export writes",
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


# Metrics and padding


def test_padding_does_not_count_in_metrics():
    task = Task(jax.ShapeDtypeStruct((3,), np.int32), (3,))
    answer = np.float32(
        [[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [[0.5, 0.5], [0.3, 0.7], [1.0, 0.0]]]
    )
    label = np.int32([[0, 0, PADDING], [PADDING] * 3])
    measured = {
        name: (float(total), int(count))
        for name, (total, count) in task.metrics(answer, label).items()
    }
    assert measured["accuracy"] == (1.0, 2)
    assert measured["loss"] == (pytest.approx(-np.log(0.9) - np.log(0.2)), 2)
    without_padding = task.metrics(answer, np.where(label == PADDING, 0, label))
    correct, count = without_padding["accuracy"]
    assert (float(correct), int(count)) == (4.0, 6)


def sequences(train: int = 24, test: int = 5) -> DataSet:
    def numbered(count: int) -> Examples:
        tokens = np.arange(count)[:, None] + np.zeros(4, np.int32)
        return Examples(tokens.astype(np.int32), (tokens % 3).astype(np.int64))

    return DataSet("sequences", ("a", "b", "c"), numbered(train), numbered(test))


def test_source_handles_rows_of_labels_in_batches_and_padding():
    source = ArraySource(
        sequences(), batch_size=4, seed=0, validation_fraction=0.25, train_examples=12
    )
    assert (source.example_shape, source.example_dtype, source.label_shape) == ((4,), "int32", (4,))
    assert (source.mean, source.std) == ((), ())
    assert [source.examples(split) for split in ("train", "validation", "test")] == [12, 6, 5]
    for step in range(6):
        batch = source.batch(step)
        np.testing.assert_array_equal(batch.inputs[:, 0], batch.context["id"])
        np.testing.assert_array_equal(batch.context["label"], batch.inputs % 3)
        assert batch.context["label"].dtype == np.int32
    *_, last = source.evaluation("test")
    assert last.inputs.dtype == np.int32
    assert last.context["label"].tolist() == [[1] * 4] + [[PADDING] * 4] * 3
    assert last.context["id"].tolist() == [4, PADDING, PADDING, PADDING]


def test_validation_split_with_several_labels_per_example_is_not_stratified():
    rows = np.zeros((20, 4), np.int32)
    chosen = [stratified(rows, 5, np.random.Philox(seed)).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(set(chosen[0]))
    assert len(chosen[0]) == 5
    order = np.argsort(np.random.Philox(0).random_raw(20), kind="stable")
    assert chosen[0] == sorted(order[:5].tolist())


def test_random_draws_of_a_task_depend_on_seed_and_step():
    task = TASKS["token_labels"].make(make_settings(config(task__hidden=0.5)).task, task_inputs())
    tokens = np.zeros((64, LENGTH), np.int32)
    one, again, later = (np.asarray(task.train(augment_key(0, step), tokens)) for step in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, later)
    assert 0.4 < (one == SYMBOLS).mean() < 0.6
    assert np.array_equal(task.evaluate(tokens), tokens)


def task_inputs() -> TaskInputs:
    example = jax.ShapeDtypeStruct((LENGTH,), np.int32)
    return TaskInputs(
        name="tokens", example=example, label=(LENGTH,), classes=8, mean=(), std=(), augment="none"
    )


# Combinations that are refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"task__name": "image_classification"},
            r"^config\.task\.name=image_classification: needs uint8 images "
            r"\(height, width, channels\) with one label each, but config\.data\.name=token_sums "
            r"has int32 examples of shape \(16,\) with labels of shape \(16,\)$",
        ),
        (
            {"data__name": "digits"},
            r"^config\.task\.name=token_labels: needs tokens \(T,\) with one label each, but "
            r"config\.data\.name=digits has uint8 examples of shape \(8, 8, 1\) "
            r"with labels of shape \(\)$",
        ),
        (
            {"model__name": "cnn4"},
            r"^config\.model\.name='cnn4': reads images \(height, .*\), "
            r"not examples of shape \(16,\)",
        ),
        (
            {"model__head": "linear"},
            r"^config\.model\.head: returns logits of shape \(8, 8\) for labels of shape \(8, 16\)",
        ),
        (
            {"task__name": "token_label"},
            r"^config\.task\.name='token_label': no such name; did you mean token_labels\?$",
        ),
    ],
)
def test_mismatched_parts_are_a_one_line_error(fields, message):
    with pytest.raises(UserError, match=message):
        experiment(**fields).spec.abstract_states()


def test_image_options_do_not_apply_to_tokens():
    with pytest.raises(
        UserError,
        match=r"^config\.data\.augment='crop_flip': applies to config\.task\.name=image_class",
    ):
        make_settings(config(data__augment="crop_flip"), given=["data.augment"])
    assert set(make_settings(config(data__image_size=9)).ignored) == {"data.image_size"}
    with pytest.raises(
        UserError,
        match=r"^config\.task\.hidden=0\.5: applies to config\.task\.name=token_labels, not to",
    ):
        make_settings(
            config(task__name="image_classification", task__hidden=0.5), given=["task.hidden"]
        )


def test_plan_needs_shapes_known_before_loading(monkeypatch):
    """A token set that states its layout is planned; one that does not is refused."""
    settings = make_settings(config())
    report = json.loads(plan_run(settings, stated="1,2,3,4", as_json=True))
    assert report["speedup"] > 1
    # The first module sends [16, 16] float32 features, 16 labels and an id per sequence.
    assert report["modules"][0]["wire_bytes"] == 4 * (16 * 16 + 16 + 1)
    kind = dataclasses.replace(DATA_SETS["token_sums"], layout=None)
    monkeypatch.setitem(DATA_SETS._kinds, "token_sums", kind)
    with pytest.raises(
        UserError,
        match=r"^config\.data\.name=token_sums: its shapes are not known before it is read",
    ):
        plan_run(settings, stated="1,2,3,4")


def test_head_must_return_logits_for_each_label():
    with pytest.raises(UserError, match=r"one row of logits for each label"):
        cross_entropy(jnp.zeros((4, 3)), jnp.zeros((4, 2), jnp.int32))


def test_default_task_is_image_classification():
    settings = make_settings(small_config())
    assert settings.task.name == "image_classification"
    task = make_experiment(settings, jax.devices()[:1]).spec.task
    assert isinstance(task, ImageClassification)
    assert (task.inputs(5).shape, task.inputs(5).dtype, task.label) == (
        (5, 8, 8, 3),
        np.float32,
        (),
    )
