"""Whole layer-wise runs: records, checkpoints, resume, the tools, and refused settings."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from plugin_runs import MIRROR
from plugin_runs import config as plugin_config
from runs import arrays, same_run, small_config

from dgl_jax.config import make_settings
from dgl_jax.core import ema
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.run.build import make_experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.metrics import Window
from dgl_jax.run.plots import plot
from dgl_jax.run.restore import borrow_weights, load_trained
from dgl_jax.run.signals import Interrupted
from dgl_jax.run.writers import read_jsonl
from dgl_jax.tools.bench import bench
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.plan import plan
from dgl_jax.train import train_and_evaluate

FIELDS: dict[str, Any] = {
    "method__name": "layerwise",
    "schedule__name": "cosine",
    "checkpoint__every": 3,
    "checkpoint__keep": 9,
    "eval__every": 3,
}
config = partial(small_config, **FIELDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Returns the workdir of an uninterrupted run; module 0 trains until step 6 of 12."""
    workdir = tmp_path_factory.mktemp("layerwise") / "whole"
    summary = train_and_evaluate(config(), workdir)
    assert summary.steps == 12
    assert summary.epochs == 2.0
    assert [module["updates"] for module in summary.modules] == [12, 12]
    return workdir


def interrupted(workdir: Path, updates: int, **fields: Any) -> None:
    """Trains until a signal arrives after this number of updates of all modules together."""
    add = Window.add

    def add_and_raise(self, report):
        add(self, report)
        if sum(report.updates) == updates:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "add", add_and_raise)
        with pytest.raises(Interrupted):
            train_and_evaluate(config(**fields), workdir)


@pytest.mark.medium
def test_run_is_logged_evaluated_and_saved_from_the_first_module_on(whole):
    records = read_jsonl(whole / "metrics.jsonl")
    training = {r["step"]: r for r in records if "learning_rate" in r}
    assert sorted(training) == [3, 6, 9, 12]
    for step, record in training.items():
        trains = int(step > 6)
        assert f"train/module_{trains}/loss" in record
        assert f"train/module_{1 - trains}/loss" not in record
        assert record["epoch"] == step / 6
    # Cosine decay over the 12 updates of each module, of which 6 are made in 3 steps.
    rates = [0.025 * (1 + np.cos(np.pi * updates / 12)) for updates in (5, 11, 5, 11)]
    assert [training[s]["learning_rate"] for s in (3, 6, 9, 12)] == pytest.approx(rates, rel=1e-5)
    evaluated = [r["step"] for r in records if "validation/ensemble/accuracy" in r]
    assert evaluated == [3, 6, 9, 12]
    assert "images_per_second" in training[6]


@pytest.mark.medium
def test_checkpoint_of_an_untrained_last_module_is_never_the_best(whole):
    checkpoints = Checkpoints(whole / "checkpoints", read_only=True)
    assert checkpoints.steps() == [3, 6, 9, 12]
    records = read_jsonl(whole / "metrics.jsonl")
    accuracy = {
        r["step"]: r["validation/module_1/accuracy"]
        for r in records
        if "validation/module_1/accuracy" in r
    }
    stored = [checkpoints.meta(step)["accuracy"] for step in (3, 6, 9, 12)]
    assert stored == [None, None, accuracy[9], accuracy[12]]
    assert checkpoints.select("best")[0] in (9, 12)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [5, 12, 19], ids=["first module", "boundary", "last module"])
def test_resumed_run_equals_uninterrupted_run(whole, tmp_path, updates):
    interrupted(tmp_path, updates)
    modules = load_trained(tmp_path).restored.state.modules
    counts = [int(module.updates) for module in modules]
    assert counts == [min(sum(counts), 12), max(0, sum(counts) - 12)]
    assert updates <= sum(counts) < updates + 4  # ticks in flight are finished, nothing more
    assert load_trained(tmp_path).restored.step == sum(counts) // 2
    train_and_evaluate(config(), tmp_path)
    assert same_run(whole, tmp_path)


@pytest.mark.slow
def test_run_resumes_with_the_other_engine(whole, tmp_path):
    interrupted(tmp_path, 17, engine__name="pipeline", engine__group_sizes=(1, 1))
    train_and_evaluate(config(), tmp_path)
    for one, other in zip(arrays(whole), arrays(tmp_path), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_length_changes_only_between_runs(whole, tmp_path):
    interrupted(tmp_path, 15)
    with pytest.raises(UserError, match=r"20 steps.*planned with 12.*have made 12, \d updates"):
        train_and_evaluate(config(train__steps=20), tmp_path)
    train_and_evaluate(config(), tmp_path)
    assert same_run(whole, tmp_path)
    summary = train_and_evaluate(config(train__steps=16), tmp_path)
    assert [module["updates"] for module in summary.modules] == [16, 16]
    assert summary.steps == 16


@pytest.mark.slow
@pytest.mark.pictures
def test_finished_run_serves_every_mode(whole, tmp_path):
    assert evaluate_run(whole)["step"] == 12
    logits = load_exported(export_run(whole)).logits(np.zeros((2, 8, 8, 3), np.uint8))
    assert len(logits) == 2
    assert {path.stem for path in plot(whole)} >= {"accuracy", "loss"}
    start = train_and_evaluate(config(train__steps=2), tmp_path / "next", init_from=whole)
    assert start.steps == 2


@pytest.mark.medium
def test_averages_of_untrained_modules_begin_at_the_weights_of_another_run(whole):
    other = load_trained(whole)
    experiment = make_experiment(make_settings(config(train__ema=0.9)))
    fresh = experiment.engine.init()
    start = borrow_weights(experiment.spec, fresh, other)
    for mine, theirs in zip(start.modules, other.restored.state.modules, strict=True):
        for values in (ema.evaluated(mine), (mine.params, mine.batch_stats)):
            jax.tree.map(np.testing.assert_array_equal, values, (theirs.params, theirs.batch_stats))


@pytest.mark.slow
def test_bench_measures_all_modules():
    measured = bench(config(method__laps=12), steps=4)  # fewer steps than laps
    assert measured["method"] == "layerwise"
    assert measured["images_per_second"] > 0
    assert measured["module_milliseconds"] == []


def test_what_the_method_cannot_do_is_refused_by_name():
    with pytest.raises(UserError, match=r"engine.name=threads: .*layerwise runs under fused or"):
        make_experiment(make_settings(config(engine__name="threads")))
    with pytest.raises(UserError, match=r"method\.laps=13: 12 steps give less than one step"):
        make_settings(config(method__laps=13))
    with pytest.raises(UserError, match=r"method.name=layerwise: --mode=plan"):
        plan(make_settings(config()))


def test_objective_that_reads_its_own_blocks_is_accepted():
    fields = {"model__name": "resnet20", "objective__transport": 0.1}
    module = make_experiment(make_settings(config(**fields))).spec.modules[0]
    assert module.objective.reads == ("intermediates",)


@pytest.mark.usefixtures("plugin_kinds")
def test_objective_that_reads_from_above_is_refused_by_name():
    settings = make_settings(plugin_config(method__name="layerwise", **MIRROR))
    with pytest.raises(UserError, match="the objective of module_0 reads next_block"):
        make_experiment(settings)
