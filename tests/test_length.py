"""Lengths that a run which has begun can still have."""

import signal

import pytest
from plugin_runs import equal
from runs import arrays, small_config

from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.run.begin import _check_new_length, _difference
from dgl_jax.run.metrics import Window
from dgl_jax.run.signals import Interrupted
from dgl_jax.testing import make_experiment
from dgl_jax.train import train_and_evaluate


@pytest.mark.parametrize(
    ("method", "planned", "total", "made", "message"),
    [
        ("dgl", 200, 150, (150, 150), ""),
        ("dgl", 200, 149, (150, 150), "use at least 150 steps"),
        ("dgl", 200, 79, (80, 50), "use at least 80 steps"),  # asynchronous
        # Every batch passes all modules in one tick; updates wait for gradients.
        ("ddg", 100, 52, (50, 51, 52), ""),
        ("ddg", 100, 51, (50, 51, 52), "use at least 52 steps"),
        ("ddg", 100, 200, (98, 99, 100), ""),
        ("ddg", 100, 200, (99, 100, 100), "method.name=ddg must finish with 100 before"),
        ("features_replay", 100, 200, (99, 100, 100), "must finish with 100 before"),
        ("ddg", 100, 200, (100, 100, 100), ""),
        # Activations wait too: the first module is two batches ahead of the last one.
        ("fdg", 100, 54, (50, 51, 52), ""),
        ("fdg", 100, 53, (50, 51, 52), "use at least 54 steps"),
        ("fdg", 100, 120, (96, 97, 98), ""),
        ("fdg", 100, 120, (97, 98, 99), "method.name=fdg must finish with 100 before"),
        ("fdg", 100, 99, (97, 98, 99), "use at least 100 steps"),
        ("fdg", 100, 120, (100, 100, 100), ""),
        ("layerwise", 100, 120, (100, 100), ""),
        ("layerwise", 100, 99, (100, 100), "use at least 100 steps"),
        ("layerwise", 100, 120, (100, 20), "method.name=layerwise must finish with 100 before"),
        # After the first of two laps.
        ("layerwise", 100, 120, (50, 50), "method.name=layerwise must finish with 100 before"),
    ],
)
def test_lengths_that_fit_what_the_modules_have_seen(method, planned, total, made, message):
    settings = make_settings(small_config(method__name=method))
    if not message:
        _check_new_length(settings, planned, total, made)
        return
    with pytest.raises(UserError) as caught:
        _check_new_length(settings, planned, total, made)
    updates = ", ".join(map(str, made))
    assert str(caught.value).startswith(
        f"config.train: {total} steps, but this run was planned with {planned} and its modules "
        f"have made {updates} updates; "
    )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("method", "made", "reason"),
    [
        ("dgl", (12, 12), ""),
        ("layerwise", (12, 12), "the modules train one after the other again"),
        ("ddg", (11, 12), ""),
        ("ddg", (12, 12), "at step 12 the gradients in flight were used up"),
        ("fdg", (12, 12), "at step 12 the gradients in flight were used up"),
        ("fdg", (12,), ""),
    ],
)
def test_why_an_extended_run_differs_from_one_planned_so(method, made, reason):
    settings = make_settings(small_config(method__name=method))
    assert _difference(settings, 12, made) == reason


@pytest.mark.slow
@pytest.mark.full_compile
def test_shortened_run_with_batches_in_flight_equals_one_planned_so(tmp_path, monkeypatch):
    def config(steps):
        return small_config(method__name="fdg", train__steps=steps, checkpoint__every=20)

    add = Window.add

    def add_and_stop(self, report):
        add(self, report)
        if report.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Window, "add", add_and_stop)
        with pytest.raises(Interrupted):
            train_and_evaluate(config(12), tmp_path / "part")
    # Module 0 has run eight batches forward.
    with pytest.raises(UserError, match="have made 6, 7 updates; use at least 8 steps"):
        train_and_evaluate(config(7), tmp_path / "part")
    train_and_evaluate(config(9), tmp_path / "part")
    train_and_evaluate(config(9), tmp_path / "whole")
    assert equal(arrays(tmp_path / "part"), arrays(tmp_path / "whole"))


@pytest.mark.parametrize("length", [{"train__steps": 6}, {"train__steps": 0, "train__epochs": 1.0}])
def test_a_lap_without_a_step_is_refused(length):
    fields = {"method__name": "layerwise", **length}
    make_experiment(make_settings(small_config(**fields, method__laps=6)))
    with pytest.raises(UserError, match=r"^config\.method\.laps=7: 6 steps give less than one"):
        make_experiment(make_settings(small_config(**fields, method__laps=7)))
