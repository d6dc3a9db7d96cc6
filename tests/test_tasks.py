"""Tasks: a user's own with a label a token (`examples/plugin/tokens.py`) under all engines, what it counts, and what is refused."""

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
from dgl_jax.registry import TASKS
from dgl_jax.run.build import known_info, make_experiment
from dgl_jax.run.plots import plot
from dgl_jax.tasks import ImageClassification, Task, TaskInputs, augment_key
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
    """The small run on tokens."""
    made = default_config(("examples.plugin",))
    made.update(small_config().to_dict() | {"plugins": made.plugins})
    made.data.augment, made.data.image_size = "none", 0
    for name, value in (TOKENS | {"model__width": 16} | fields).items():
        group, _, leaf = name.partition("__")
        setattr(made[group], leaf, value)
    return made


def experiment(devices: int = 1, **fields: Any):
    return make_experiment(make_settings(config(**fields)), jax.devices()[:devices])


def trained(steps: int, devices: int = 2, **fields: Any):
    made = experiment(devices, **fields)
    *_, last = made.engine.run(made.engine.init(), made.source, steps)
    return [jax.device_get(module.params) for module in last.snapshot().modules]


def furthest(one, other):
    return max(
        float(np.max(np.abs(a - b)))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


# Training


def by_hand(steps: int, hidden: float, shift: int = 0):
    """Two modules on tokens in plain JAX; `shift` moves the labels, as a mistake would."""
    made = experiment(task__hidden=hidden)
    params = [state.params for state in made.spec.init()]
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))
    kept = [optimizer.init(p) for p in params]
    data, order = made.source._stored["train"], made.source._order

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
        unseen = jax.random.bernoulli(
            rngs.augmentation(rngs.root(0), number), hidden, (len(ids), LENGTH)
        )
        x = jnp.where(unseen, SYMBOLS, data.inputs[ids])
        for k, module in enumerate(made.spec.modules):
            blocks = tuple(enumerate(module.blocks, module.first))
            (_, x), gradient = step(params[k], blocks, x, label)
            updates, kept[k] = optimizer.update(gradient, kept[k], params[k])
            params[k] = optax.apply_updates(params[k], updates)
    return params


@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_labels_a_token_are_the_hand_written_loop(engine):
    found = trained(3, task__hidden=0.25, engine__name=engine)
    assert furthest(found, by_hand(3, 0.25)) < 1e-5
    assert furthest(found, by_hand(3, 0.25, shift=1)) > 1e-4, (
        "labels of other tokens went unnoticed"
    )
    assert furthest(found, by_hand(3, 0.0)) > 1e-4, "what hides tokens went unnoticed"


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize(
    "fields", [{}, {"model__remat": True, "train__accumulate": 2}, {"codec__name": "bf16"}]
)
def test_synchronous_engines_agree_to_the_bit(fields):
    one, other = (
        trained(4, count, engine__name=name, **fields)
        for name, count in (("fused", 1), ("pipeline", 2))
    )
    assert furthest(one, other) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulated", "threads"])
def test_asynchronous_engines_carry_rows_of_labels_through_rings(engine, tmp_path):
    summary = train_and_evaluate(config(engine__name=engine, replay__size=3), tmp_path)
    assert [module["updates"] for module in summary.modules] == [12, 12]
    assert all(0 <= module["test_accuracy"] <= 1 for module in summary.modules)


@pytest.mark.slow
def test_the_second_module_learns_what_the_first_cannot_see(tmp_path):
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
def test_a_resumed_run_is_the_whole_run(run, tmp_path):
    fields = {"task__hidden": 0.1, "data__validation_fraction": 0.1, "codec__name": "bf16"}
    train_and_evaluate(config(**fields, train__steps=4), tmp_path)
    train_and_evaluate(config(**fields), tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(run[0]), arrays(tmp_path), strict=True))
    train_and_evaluate(config(**fields | {"task__hidden": 0.2}), tmp_path / "other")
    assert any(not np.array_equal(a, b) for a, b in zip(arrays(run[0]), arrays(tmp_path / "other")))
    with pytest.raises(UserError, match=r"config\.task\.hidden \(was 0\.1, is now 0\.2\)"):
        train_and_evaluate(config(**fields | {"task__hidden": 0.2}), tmp_path)


def test_accuracies_are_over_tokens_as_counted_in_numpy(run):
    """500 sequences in batches of 8: the last batch is padded."""
    workdir, summary = run
    network = load_exported(export_run(workdir))
    source = make_experiment(make_settings(config()), jax.devices()[:1]).source
    stored = source._stored["test"]
    logits = network.logits(stored.inputs)
    assert [answer.shape for answer in logits] == [(500, LENGTH, SYMBOLS)] * 2
    right = [np.asarray(answer).argmax(-1) == stored.labels for answer in logits]
    found = evaluate_run(workdir)
    for k, of_module in enumerate(right):
        assert found[f"test/module_{k}/accuracy"] == pytest.approx(
            of_module.sum() / (500 * LENGTH), abs=1e-9
        )
        odds = np.asarray(jax.nn.log_softmax(logits[k]), np.float64)
        nats = -np.take_along_axis(odds, stored.labels[..., None], -1).mean()
        assert found[f"test/module_{k}/loss"] == pytest.approx(nats, rel=1e-5)
        assert of_module.all(1).mean() < found[f"test/module_{k}/accuracy"], (
            "whole sequences were counted"
        )
    odds = [np.asarray(jax.nn.softmax(answer), np.float64) for answer in logits]
    expected = ((odds[0] + 2 * odds[1]).argmax(-1) == stored.labels).mean()
    assert found["test/ensemble/accuracy"] == pytest.approx(expected, abs=2 / (500 * LENGTH))
    assert found["test/ensemble/accuracy"] == pytest.approx(summary.ensemble_accuracy)
    assert "test/ensemble/loss" not in found
    assert [record for record in records(workdir) if "validation/module_1/accuracy" in record]


def test_a_run_on_tokens_is_drawn(run):
    assert {path.name for path in plot(run[0])} >= {"accuracy.png", "loss.png"}


def test_predict_reads_images_alone(run):
    with pytest.raises(
        UserError,
        match=r"^config\.task\.name=token_labels: --mode=predict reads images; --mode=export writes",
    ):
        predict_run(run[0], "newest", ["nowhere"], None)


def test_what_travels_is_counted_with_a_label_a_token():
    spec = experiment().spec
    assert spec.inputs() == jax.ShapeDtypeStruct((8, LENGTH), np.int32)
    assert spec.context(1)["label"].shape == (8, LENGTH)
    assert spec.traffic().wire == (LENGTH * 16 * 4 + LENGTH * 4 + 4,)
    assert module_memory(spec)[0].packet == 8 * (2 * LENGTH * 4 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["flops", "time"])
def test_tokens_are_cut_by_cost(split):
    assert experiment(model__split=split).spec.modules[0].first == 0


# Metrics and padding


def test_what_is_padding_does_not_count():
    task = Task(jax.ShapeDtypeStruct((3,), np.int32), (3,))
    answer = np.float32(
        [[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [[0.5, 0.5], [0.3, 0.7], [1.0, 0.0]]]
    )
    label = np.int32([[0, 0, PADDING], [PADDING] * 3])
    found = {
        name: (float(total), int(count))
        for name, (total, count) in task.metrics(answer, label).items()
    }
    assert found["accuracy"] == (1.0, 2)
    assert found["loss"] == (pytest.approx(-np.log(0.9) - np.log(0.2)), 2)
    counted = task.metrics(answer, np.where(label == PADDING, 0, label))
    assert (float(counted["accuracy"][0]), int(counted["accuracy"][1])) == (4.0, 6)


def sequences(train: int = 24, test: int = 5) -> DataSet:
    def numbered(count: int) -> Examples:
        tokens = np.arange(count)[:, None] + np.zeros(4, np.int32)
        return Examples(tokens.astype(np.int32), (tokens % 3).astype(np.int64))

    return DataSet("sequences", ("a", "b", "c"), numbered(train), numbered(test))


def test_rows_of_labels_go_through_batches_shapes_and_padding():
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


def test_examples_of_several_labels_are_held_out_by_a_plain_draw():
    rows = np.zeros((20, 4), np.int32)
    chosen = [stratified(rows, 5, np.random.Philox(seed)).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(set(chosen[0]))
    assert len(chosen[0]) == 5
    order = np.argsort(np.random.Philox(0).random_raw(20), kind="stable")
    assert chosen[0] == sorted(order[:5].tolist())


def test_draws_of_a_task_are_of_the_seed_and_the_step():
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
        name="some", example=example, label=(LENGTH,), classes=8, mean=(), std=(), augment="none"
    )


# What does not fit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"task__name": "image_classification"},
            r"^config\.task\.name=image_classification: works on uint8 images \(height, width, channels\) with one label each, and "
            r"config\.data\.name=token_sums holds int32 examples of shape \(16,\) with labels of shape \(16,\)$",
        ),
        (
            {"data__name": "digits"},
            r"^config\.task\.name=token_labels: works on tokens \(T,\) with a label each, and "
            r"config\.data\.name=digits holds uint8 examples of shape \(8, 8, 1\) with labels of shape \(\)$",
        ),
        (
            {"model__name": "cnn4"},
            r"^config\.model\.name='cnn4': reads images \(height, .*\), not examples of shape \(16,\)",
        ),
        (
            {"model__head": "linear"},
            r"^config\.model\.head: gives logits of shape \(8, 8\) for labels of shape \(8, 16\)",
        ),
        (
            {"task__name": "token_label"},
            r"^config\.task\.name='token_label': no such name; did you mean token_labels\?$",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        experiment(**fields).spec.abstract_states()


def test_options_of_images_do_not_apply_to_tokens():
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


def test_only_images_are_known_before_they_are_read():
    with pytest.raises(
        UserError,
        match=r"^config\.data\.name=token_sums: .* known once it is read; plan with images of",
    ):
        known_info(make_settings(config()).data)


def test_a_head_must_answer_each_label():
    with pytest.raises(UserError, match=r"a row of logits for each label"):
        cross_entropy(jnp.zeros((4, 3)), jnp.zeros((4, 2), jnp.int32))


def test_the_usual_task_is_image_classification():
    settings = make_settings(small_config())
    assert settings.task.name == "image_classification"
    task = make_experiment(settings, jax.devices()[:1]).spec.task
    assert isinstance(task, ImageClassification)
    assert (task.inputs(5).shape, task.inputs(5).dtype, task.label) == (
        (5, 8, 8, 3),
        np.float32,
        (),
    )
