"""Remat, micro-batches, label smoothing and EMA together in every engine, and EMA alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import arrays, same_run, small_config
from test_resume import interrupted
from test_training import Dense, Logits, Normal, largest_error

from dgl_jax.config import ReplaySettings
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState, make_modules
from dgl_jax.engines import (
    EngineState,
    FusedEngine,
    PipelineEngine,
    SimulatedEngine,
    SimulatedOptions,
    ThreadsEngine,
    ThreadsOptions,
    counts,
)
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.methods.backprop import Backprop
from dgl_jax.models import register_network
from dgl_jax.objectives import Classifier
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.restore import borrow_weights, load_trained
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate

# All options together, in every engine

STEPS = 3
OPTIONS = {"accumulate": 2, "label_smoothing": 0.1, "ema": 0.5}


@pytest.fixture(scope="module")
def spec(tiny):
    """Returns a function that makes specs with every option on and without convolutions."""

    def make(modules=2, label_smoothing=OPTIONS["label_smoothing"], **changes):
        heads = [Classifier(Logits(), label_smoothing)] * modules
        blocks = [Dense(), Normal(), Dense(0.5)]
        local_modules = make_modules(blocks, (0, 2)[:modules], heads, remat=True)
        return dataclasses.replace(
            tiny.spec(modules), modules=local_modules, **({"accumulate": 2, "ema": 0.5} | changes)
        )

    return make


@pytest.fixture(scope="module")
def fused(tiny, devices, spec):
    return tiny.run(FusedEngine(spec(), one_group(devices[:1], 2)), STEPS)


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b)
    )


@pytest.mark.full_compile
@pytest.mark.slow
def test_pipeline_equals_fused_bit_for_bit(tiny, devices, spec, fused):
    assert same(tiny.run(PipelineEngine(spec(), assign(devices, 2, (1, 1))), STEPS), fused)


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_twin_without_one_option_the_states_differ(tiny, devices, spec, fused, option):
    without = spec(**{option: 1 if option == "accumulate" else 0.0})
    states, _ = tiny.run(FusedEngine(without, one_group(devices[:1], 2)), STEPS)
    assert same([s.params for s in states], [s.params for s in fused[0]]) == (option == "ema"), (
        "the average must not influence training"
    )
    assert not same(states, fused[0])


@pytest.mark.medium
@pytest.mark.full_compile
def test_simulated_with_ordered_turns_and_rings_of_one_equals_fused_bit_for_bit(
    tiny, devices, spec, fused, to_host
):
    engine = SimulatedEngine(
        spec(),
        one_group(devices[:1], 2),
        STEPS,
        SimulatedOptions(order="ordered"),
        ReplaySettings(1),
    )
    state = engine.resume(tiny.place(engine, tiny.init(engine.spec)), None)
    for report in engine.run(state, tiny.source, STEPS):
        state = report.snapshot()
    assert same(to_host(state.modules), fused[0])


@pytest.mark.full_compile
@pytest.mark.slow
def test_backprop_equals_fused_for_one_module(tiny, devices, spec):
    placement = one_group(devices[:1], 1)
    backprop = FusedEngine(dataclasses.replace(spec(1), method=Backprop()), placement)
    assert same(tiny.run(backprop, STEPS), tiny.run(FusedEngine(spec(1), placement), STEPS))


@pytest.mark.slow
def test_two_devices_equal_one_within_rounding(tiny, devices, spec):
    one, two = (tiny.run(FusedEngine(spec(1), one_group(devices[:n], 1)), 1) for n in (1, 2))
    assert largest_error([s.params for s in two[0]], [s.params for s in one[0]]) < 1e-5


@pytest.mark.medium
def test_threads_engine_keeps_an_average(tiny, devices, spec, to_host):
    engine = ThreadsEngine(spec(), assign(devices, 2, (1, 1)), ThreadsOptions(), ReplaySettings(2))
    *_, last = engine.run(
        engine.resume(tiny.place(engine, tiny.init(engine.spec)), None), tiny.source, STEPS
    )
    state = last.snapshot()
    assert counts(state) == [STEPS] * 2
    for module in to_host(state.modules):
        averaged, _ = ema.evaluated(module)
        assert 1e-6 < largest_error(averaged, module.params) < 1.0


# The exponential moving average (EMA) of the parameters


@pytest.fixture(scope="module")
def history(tiny, devices, spec):
    """Returns an engine and the states after each of three updates, with averages of decay 0.9."""
    engine = FusedEngine(spec(ema=0.9, accumulate=1), one_group(devices[:1], 2))
    states, history = None, []
    for until in (1, 2, 3):
        states, _ = tiny.run(engine, until, states)
        history.append(states)
    return engine, history


def weighted(history, k, weights):
    """Returns the weighted average of module k's parameters and batch statistics over updates."""
    values = [(states[k].params, states[k].batch_stats) for states in history]
    return jax.tree.map(lambda *x: np.average(np.float64(x), axis=0, weights=weights), *values)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999999])
def test_first_average_is_the_first_value(decay):
    state = ModuleState({"w": jnp.float32(-3.0)}, {}, (), jax.random.key(0), jnp.int32(0))
    first = dataclasses.replace(ema.begin(state), params={"w": jnp.float32(5.0)}, updates=1)
    params, _ = ema.evaluated(ema.advance(first, decay))
    np.testing.assert_allclose(params["w"], 5.0, rtol=1e-6)


def test_average_equals_the_weighted_mean_over_updates(history):
    _, updates = history
    for k in range(2):
        for n, weights in enumerate(([1], [0.9, 1], [0.81, 0.9, 1]), 1):
            averaged = ema.evaluated(updates[n - 1][k])
            assert largest_error(averaged, weighted(updates[:n], k, weights)) < 1e-6
        last = updates[-1][k]
        # Neither a decay of 1 nor the absence of an average would pass.
        assert largest_error(ema.evaluated(last), weighted(updates, k, [1, 1, 1])) > 1e-5
        assert largest_error(ema.evaluated(last), (last.params, last.batch_stats)) > 1e-4


def test_without_ema_the_parameters_are_evaluated(tiny):
    (state, *_) = tiny.init(tiny.spec())
    assert ema.evaluated(state) == (state.params, state.batch_stats)


def test_evaluation_uses_the_average(tiny, history):
    engine, updates = history
    evaluator = Evaluator(engine.spec, engine.placement)

    def losses(states):
        scores = evaluator.evaluate(tiny.place(engine, states), tiny.source, "test")
        return [value for name, value in scores.items() if name.endswith("loss")]

    averaged = losses(updates[-1])
    bare = tuple(s.replace(extras={}) for s in updates[-1])
    by_hand = tuple(
        s.replace(
            **dict(
                zip(
                    ("params", "batch_stats"),
                    jax.tree.map(np.float32, weighted(updates, k, [0.81, 0.9, 1])),
                )
            )
        )
        for k, s in enumerate(bare)
    )
    assert averaged == pytest.approx(losses(by_hand), rel=1e-5)
    assert averaged != pytest.approx(losses(bare), rel=1e-4)


register_network(
    "dense", lambda width, num_classes, dtype: [Dense(), Normal(), Dense(0.5), Normal()]
)
RUN = {
    "model__name": "dense",
    "train__ema": 0.9,
    "train__accumulate": 2,
    "train__label_smoothing": 0.1,
    "model__remat": True,
    "engine__name": "pipeline",
}
RUN |= {"engine__group_sizes": (1, 1), "train__steps": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train_and_evaluate(small_config(**RUN), workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped")
    interrupted(workdir, 5, small_config(**RUN))
    return workdir


@pytest.mark.slow
def test_resumed_run_with_all_options_equals_uninterrupted_run(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    train_and_evaluate(small_config(**RUN), tmp_path / "run")
    assert same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_twin_average_restarted_on_resume_is_noticed(whole, stopped, tmp_path, monkeypatch):
    def forgetful(self, state, saved):
        return self.place(
            EngineState(tuple(ema.begin(s.replace(extras={})) for s in state.modules))
        )

    monkeypatch.setattr(PipelineEngine, "resume", forgetful)
    shutil.copytree(stopped, tmp_path / "run")
    train_and_evaluate(small_config(**RUN), tmp_path / "run")
    equal = [
        np.array_equal(a, b) for a, b in zip(arrays(whole), arrays(tmp_path / "run"), strict=True)
    ]
    assert any(equal)
    assert not all(equal)


@pytest.mark.slow
def test_changed_decay_is_refused_with_the_field(whole):
    with pytest.raises(UserError, match=r"config\.train\.ema \(was 0\.9, is now 0\.0\)"):
        train_and_evaluate(small_config(**RUN | {"train__ema": 0.0}), whole)


@pytest.mark.slow
def test_export_init_from_and_evaluation_use_the_average(whole, tmp_path):
    trained = load_trained(whole)
    exported = load_exported(export_run(whole, output=tmp_path))
    borrowed = borrow_weights(trained.spec, trained.restored.state, trained)
    for module, variables, mine in zip(
        trained.restored.state.modules, exported.variables, borrowed.modules
    ):
        average = {name: module.extras["ema"][name] for name in ("params", "batch_stats")}
        assert same({name: variables[name] for name in average}, average)
        assert same((mine.params, mine.batch_stats), (average["params"], average["batch_stats"]))
        assert not same(average["params"], module.params)
    summary = json.loads((whole / "summary.json").read_text())
    measured = evaluate_run(whole)
    assert [measured[f"test/module_{k}/accuracy"] for k in range(2)] == [
        m["test_accuracy"] for m in summary["modules"]
    ]
