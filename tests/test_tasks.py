"""Tests of tasks: metrics, padding, rows of labels, and combinations that are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import small_config
from token_runs import LENGTH, SYMBOLS, config, experiment

from dgl_jax.config import make_settings
from dgl_jax.config.registry import DATA_SETS, TASKS
from dgl_jax.core.rngs import augment_key
from dgl_jax.data import ArraySource, DataSet, Examples
from dgl_jax.data.order import stratified
from dgl_jax.errors import UserError
from dgl_jax.objectives import classification, cross_entropy
from dgl_jax.run.build import make_experiment
from dgl_jax.tasks import ImageClassification, Task, TaskInputs
from dgl_jax.tools.plan import plan_run
from dgl_jax.types import PADDING

pytestmark = pytest.mark.usefixtures("plugin_kinds")

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


@pytest.mark.medium
def test_plan_needs_shapes_known_before_loading(monkeypatch):
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


@pytest.mark.medium
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_padded_tokens_do_not_count(smoothing):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(2, 3, 4)), jnp.float32)
    label = jnp.asarray([[1, PADDING, 3], [PADDING, PADDING, 0]], jnp.int32)
    real = np.asarray(label) != PADDING

    def loss_of(logits, label):
        return classification(logits, label, smoothing).loss

    padded = classification(logits, label, smoothing)
    alone = classification(logits[real], label[real], smoothing)
    np.testing.assert_allclose(padded.loss, alone.loss, rtol=1e-6)
    for name, (total, count) in padded.metrics.items():
        assert count == 3
        np.testing.assert_allclose(total, alone.metrics[name][0], rtol=1e-6)
    gradient = np.asarray(jax.grad(loss_of)(logits, label))
    assert np.all(gradient[~real] == 0)
    np.testing.assert_allclose(
        gradient[real], jax.grad(loss_of)(logits[real], label[real]), rtol=1e-5
    )
    nothing = jnp.full_like(label, PADDING)
    assert float(loss_of(logits, nothing)) == 0
    assert np.all(np.asarray(jax.grad(loss_of)(logits, nothing)) == 0)


def test_twin_a_class_is_not_padding():
    logits = jnp.asarray([[[2.0, 0.0], [0.0, 0.0]]])
    counted = classification(logits, jnp.asarray([[0, 0]]))
    padded = classification(logits, jnp.asarray([[0, PADDING]]))
    assert abs(float(counted.loss - padded.loss)) > 0.1
