"""Synthesizers, refused settings, and whole runs of `dni` and `cdni`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plugin_runs import equal, furthest
from runs import arrays, small_config

from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.models import Synthesizer
from dgl_jax.run.build import make_experiment
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 3, 3, 6)])
def test_synthesizer_starts_with_its_bias_for_every_shape(shape):
    x, layer = jnp.ones(shape), Synthesizer(channels=8)
    targets = jax.nn.one_hot(jnp.arange(4), 10)
    variables = layer.init(jax.random.key(0), x, targets, train=False)
    prediction, _ = layer.apply(variables, x, targets, train=True, mutable=["batch_stats"])
    assert prediction.shape == shape
    bias = np.asarray(variables["params"]["bias"])
    np.testing.assert_array_equal(prediction, np.broadcast_to(bias, shape))
    assert 0 < np.abs(bias).max() <= 1 / np.sqrt(8 * (25 if len(shape) == 4 else 1))


def test_labels_move_the_hidden_layer_of_their_examples_only():
    x = jax.random.normal(jax.random.key(1), (4, 3, 3, 6))
    layer = Synthesizer(layers=1)
    targets = jax.nn.one_hot(jnp.array([1, 1, 2, -1]), 10)
    variables = layer.init(jax.random.key(0), x, targets, train=False)
    prediction = layer.apply(variables, x, targets, train=False)
    table = variables["params"]["targets"]["kernel"]
    shift = np.asarray(prediction - variables["params"]["bias"])
    np.testing.assert_allclose(shift[0], np.broadcast_to(table[1], (3, 3, 6)), atol=1e-6)
    np.testing.assert_allclose(shift[2], np.broadcast_to(table[2], (3, 3, 6)), atol=1e-6)
    np.testing.assert_allclose(shift[3], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__accumulate": 2}, "config.train.accumulate=2: .*dni cannot split a batch"),
        ({"method__synthesizer_kernel": 4}, "synthesizer_kernel=4: must be odd.*5 would do"),
        ({"engine__name": "threads"}, "dni runs under fused or pipeline"),
    ],
)
def test_unsupported_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make_experiment(make_settings(small_config(method__name="dni", **fields).to_dict()))


def test_shapes_without_a_synthesizer_are_refused():
    layer = Synthesizer()
    with pytest.raises(UserError, match=r"maps \(B, H, W, C\), not activations of shape \(4,\)"):
        layer.init(jax.random.key(0), jnp.ones(4), None, train=False)
    with pytest.raises(UserError, match=r"labels of shape \(4, 7\) do not fit"):
        layer.init(jax.random.key(0), jnp.ones((4, 5, 6)), jnp.ones((4, 7, 10)), train=False)


# Whole runs


@pytest.mark.slow
def test_finished_run_continues_exactly(tmp_path):
    fields = {"method__name": "cdni", "checkpoint__every": 5, "eval__every": 5}
    whole, part = (tmp_path / name for name in ("whole", "part"))
    train_and_evaluate(small_config(**fields, train__steps=9), whole)
    train_and_evaluate(small_config(**fields, train__steps=5), part)
    train_and_evaluate(small_config(**fields, train__steps=9), part)
    assert equal(arrays(whole), arrays(part))


@pytest.mark.slow
def test_finished_run_continues_under_pipeline(tmp_path):
    # The batch is split differently, so that sums are rounded differently. Without augmentation,
    # whose black margins have equal values in max pooling: rounding would choose one of them.
    fields = {"method__name": "cdni", "checkpoint__every": 5, "eval__every": 5}
    fields |= {"data__augment": "none"}
    whole, other = (tmp_path / name for name in ("whole", "other"))
    train_and_evaluate(small_config(**fields, train__steps=9), whole)
    train_and_evaluate(small_config(**fields, train__steps=5), other)
    before = arrays(other)
    train_and_evaluate(small_config(**fields, train__steps=9, engine__name="pipeline"), other)
    assert furthest(arrays(whole), arrays(other)) < 1e-5
    assert furthest(arrays(whole), before) > 1e-3


@pytest.mark.medium
def test_run_is_evaluated_and_exported_without_synthesizers(tmp_path):
    fields = {"method__name": "cdni", "log__every": 1, "train__steps": 3, "checkpoint__every": 3}
    summary = train_and_evaluate(small_config(**fields), tmp_path)
    assert [module["updates"] for module in summary.modules] == [3, 3]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "synthesizer_error" not in lines[0]
    assert "train/module_0/synthesizer_error" in "".join(lines)
    assert evaluate_run(tmp_path)["step"] == 3
    logits = load_exported(export_run(tmp_path)).logits(np.zeros((2, 8, 8, 3), np.uint8))
    assert logits[0] is None
    assert logits[-1].shape[0] == 2
