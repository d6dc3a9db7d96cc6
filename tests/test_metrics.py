"""Window of training metrics between two records."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.core.module import ModuleState
from dgl_jax.engines import EngineState, Report, counts
from dgl_jax.errors import UserError
from dgl_jax.run import metrics
from dgl_jax.run.arrays import all_finite
from dgl_jax.run.metrics import Window, diverged, read
from dgl_jax.schedule import aligned


def report(step, *losses):
    """Returns a report as engines do; the accuracy of module k is k / 10 + step / 100."""
    metrics_of_modules = tuple(
        {"loss": jnp.float32(loss), "accuracy": jnp.float32(k / 10 + step / 100)}
        for k, loss in enumerate(losses)
    )
    return Report((step,) * len(losses), metrics_of_modules, lambda: None, step=step)


def filled(window=None, start=1):
    """Returns the window with three more reports of two modules."""
    window = Window() if window is None else window
    for step, losses in enumerate([(2.0, 1.0), (4.0, 0.5), (3.0, 0.75)], start):
        window.add(report(step, *losses))
    return window


def test_close_returns_the_means_and_empties_the_window():
    window = filled()
    assert window.close() == pytest.approx(
        {
            "train/module_0/loss": 3.0,
            "train/module_0/accuracy": 0.02,
            "train/module_1/loss": 0.75,
            "train/module_1/accuracy": 0.12,
        }
    )
    assert window.close() == {}


def test_modules_without_metrics_have_no_entries():
    window = Window()
    window.add(Report((1, 1), ({}, {"loss": jnp.float32(2)}), lambda: None, step=1))
    assert window.close() == {"train/module_1/loss": 2.0}


def test_metrics_are_read_once_per_record(monkeypatch):
    reads = []
    monkeypatch.setattr(metrics, "read", lambda tree: reads.append(len(tree)) or read(tree))
    window = filled()
    assert reads == []
    window.close()
    assert reads == [3]


def test_resumed_window_equals_an_uninterrupted_one():
    whole, first = filled(), filled()
    saved = json.loads(json.dumps(first.values()))
    resumed = Window(saved)
    for window in (whole, resumed):
        filled(window, start=4)
    assert resumed.values() == whole.values()
    assert resumed.close() == whole.close()
    assert filled(start=4).close() != filled(Window(saved), start=4).close()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("resumed", [False, True])
def test_error_for_a_nonfinite_loss_names_module_and_step(bad, resumed):
    window = (
        Window([[[10, 10], [{"loss": [1.0, 1.0]}, {"loss": [1.0, 1.0]}]]]) if resumed else Window()
    )
    step = 11 if resumed else 1
    window.add(report(step, 1.0, 2.0))
    window.add(report(step + 1, 1.0, bad))
    with pytest.raises(
        UserError,
        match=rf"diverged: the loss of module_1 is (nan|inf) at step {step + 1};.*learning_rate",
    ):
        window.close()


def test_divergence_error_suggests_a_remedy():
    assert "config.optimizer.learning_rate" in str(diverged("x"))


def test_read_returns_host_values():
    values = read({"a": jnp.arange(3), "b": [jnp.float32(2)], "c": 5})
    assert isinstance(values["a"], np.ndarray)
    assert values["a"].tolist() == [0, 1, 2]
    assert values["b"] == [2.0]
    assert values["c"] == 5


def test_unequal_update_counts_are_an_error(tiny):
    first, *others = tiny.init(tiny.spec(2))
    with pytest.raises(ValueError, match=r"unequal update counts: \[0, 1\]"):
        aligned(counts(EngineState((first.replace(updates=np.int32(1)), *others))), 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["params", "batch_stats"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_with_values_that_are_not_finite_are_named(value, field, dtype):
    def module(last):
        arrays = {"params": {"a": jnp.zeros(3)}, "batch_stats": {"b": jnp.zeros(())}}
        arrays[field]["c"] = jnp.array([[1.0, last]], dtype)
        return ModuleState(**arrays, opt_state=jnp.nan, rng=None, updates=jnp.int32(0))

    state = EngineState((module(2.0), module(value), module(3.0)))
    assert all_finite(state) == [True, False, True]
