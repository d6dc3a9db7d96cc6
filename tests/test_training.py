"""Rematerialisation, micro-batches and the moving average of parameters: the same numbers, less memory, in every engine."""

import dataclasses
import json
import shutil
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import arrays, same_run, small_config
from test_resume import interrupted

from dgl_jax import system
from dgl_jax.config import ReplaySettings, make_settings
from dgl_jax.core import ema, step
from dgl_jax.core import module as local_module
from dgl_jax.core.module import init_states, make_modules
from dgl_jax.core.step import forward_step, local_step
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
from dgl_jax.engines.placement import assign, check_batch, one_group
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.export import export_run, load_exported
from dgl_jax.methods.backprop import Backprop
from dgl_jax.models import register_network
from dgl_jax.objectives import Classifier
from dgl_jax.ops import remat
from dgl_jax.run.build import make_experiment
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.restore import borrow_weights, load_trained
from dgl_jax.train import train_and_evaluate

BATCH = 8
OPTIMIZER = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
TARGETS = {"label": jnp.arange(BATCH) % 3}


class Dense(nn.Module):
    """A block without batch norm, one token of 16 channels from anything. Quick to compile, as no convolution is."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), 1, -1)))
        return nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x


class Normal(nn.Module):
    """Batch norm and nothing else."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class Wide(nn.Module):
    """A block with more inside it than it hands on."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(16)(nn.relu(nn.Dense(256)(x)))


class Logits(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(x.reshape(len(x), -1))


@cache
def one_module(*blocks, shape=(5,), remat=False):
    """A module of these blocks, its state, and inputs; values by NumPy, which has nothing to compile."""
    (module,) = make_modules(blocks, (0,), [Logits()], remat)
    random = np.random.default_rng(0)
    inputs = jax.ShapeDtypeStruct((BATCH, *shape), "float32")
    (state,) = jax.eval_shape(
        lambda key: init_states([module], OPTIMIZER, key, inputs), jax.random.key(0)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.opt_state)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), state.params
    )
    stats = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, float("var" in str(path))), state.batch_stats
    )
    state = state.replace(
        params=params,
        batch_stats=stats,
        opt_state=zeros,
        updates=jnp.int32(0),
        rng=jax.random.key(0),
    )
    return module, state, jnp.asarray(random.normal(size=inputs.shape), "float32")


def updated(module, state, inputs, **options):
    """All that one update gives, on the host."""
    new, outputs, metrics = jax.jit(partial(local_step, module, OPTIMIZER, **options))(
        state, inputs, TARGETS
    )
    return jax.tree.map(np.asarray, (new.replace(rng=None), outputs, metrics))


@cache
def plain(*blocks):
    """One update of the whole batch, nothing computed twice."""
    return updated(*one_module(*blocks))


def furthest(a, b):
    """Largest |a - b| over a pytree, in units of the largest |b| of each array."""
    distances = jax.tree.map(
        lambda x, y: np.max(np.abs(np.float64(x) - y)) / max(np.max(np.abs(y)), 1e-3), a, b
    )
    return max(jax.tree.leaves(distances))


def temporary(remat=False, **options):
    """Bytes of scratch that the compiler plans for one update of wide blocks."""
    module, state, inputs = one_module(*[Wide()] * 4, shape=(64, 16), remat=remat)
    lowered = jax.jit(partial(local_step, module, OPTIMIZER, **options)).lower(
        state, inputs, TARGETS
    )
    return system.program_plan(lowered.compile()).temporary


@pytest.fixture(scope="module")
def usual():
    """Scratch of the plain update."""
    return temporary()


# Rematerialisation

MIXED = (Dense(), Normal(), Dense(0.5), Normal())


@pytest.mark.slow
def test_recomputing_changes_no_number():
    assert furthest(updated(*one_module(*MIXED, remat=True)), plain(*MIXED)) < 1e-6


def test_twin_recomputing_with_other_parameters_is_noticed(monkeypatch):
    monkeypatch.setattr(remat, "after", lambda tree, first: jax.tree.map(lambda x: 1.01 * x, tree))
    again = updated(*one_module(*MIXED, remat=True))
    assert furthest(again[1:], plain(*MIXED)[1:]) < 1e-6  # the forward pass is the same
    assert furthest(again, plain(*MIXED)) > 1e-3


@pytest.mark.full_compile
def test_recomputing_takes_less_memory(usual):
    assert temporary(remat=True) < 0.7 * usual


@pytest.mark.full_compile
def test_twin_without_recomputing_nothing_is_saved(usual, monkeypatch):
    monkeypatch.setattr(local_module, "recomputed", lambda function, ops: function)
    assert temporary(remat=True) > 0.7 * usual


# Micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_without_batch_norm_are_the_whole_batch(parts):
    assert (
        furthest(updated(*one_module(Dense(), Dense()), accumulate=parts), plain(Dense(), Dense()))
        < 1e-6
    )


@pytest.mark.parametrize("broken", ["a part twice", "out of order", "a sum"])
def test_twins_of_micro_batches_are_noticed(monkeypatch, broken):
    split = step._split
    if broken == "a part twice":
        monkeypatch.setattr(step, "_split", lambda tree, parts: split(tree, parts)[:1] * parts)
    elif broken == "out of order":
        monkeypatch.setattr(step, "_join", jnp.concatenate)
    else:
        gradient = step.apply_gradient
        monkeypatch.setattr(
            step,
            "apply_gradient",
            lambda o, s, g, b: gradient(o, s, jax.tree.map(lambda x: 2 * x, g), b),
        )
    assert (
        furthest(updated(*one_module(Dense(), Dense()), accumulate=2), plain(Dense(), Dense()))
        > 1e-3
    )


def test_batch_norm_takes_each_micro_batch_by_itself():
    module, state, inputs = one_module(Normal())
    new, outputs, _ = updated(module, state, inputs, accumulate=2)
    x, own = np.float64(inputs), state.params["body"]["block_0"]["BatchNorm_0"]
    expected, mean, var = np.empty_like(x), np.zeros(5), np.ones(5)
    for part in (
        slice(0, None, 2),
        slice(1, None, 2),
    ):  # of eight examples the even ones, then the odd ones
        m, v = x[part].mean(0), x[part].var(0)
        expected[part] = (x[part] - m) / np.sqrt(v + 1e-5) * own["scale"] + own["bias"]
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v
    found = new.batch_stats["body"]["block_0"]["BatchNorm_0"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["var"], var, rtol=1e-5)
    # The whole batch has other statistics.
    assert not np.allclose(plain(Normal())[1], expected, rtol=1e-3)


def test_every_micro_batch_draws_its_own_dropout():
    module, state, inputs = one_module(Dense(0.5))
    outputs = updated(module, state, jnp.ones_like(inputs), accumulate=2)[1] == 0
    assert (outputs[0::2] != outputs[1::2]).any()


def test_feeding_hands_on_what_an_update_would():
    module, state, inputs = one_module(Normal(), Dense(0.5))
    whole, halves = (
        jax.jit(partial(forward_step, module, train=True, accumulate=n))(state, inputs)[0]
        for n in (1, 2)
    )
    np.testing.assert_allclose(
        halves, updated(module, state, inputs, accumulate=2)[1], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(whole, plain(Normal(), Dense(0.5))[1], rtol=1e-6, atol=1e-6)
    assert not np.allclose(whole, halves, rtol=1e-3)


@pytest.mark.full_compile
def test_micro_batches_take_less_memory(usual):
    assert temporary(accumulate=4) < 0.5 * usual


def spoilt_outputs():
    """Returns which of two micro-batches have outputs that are not finite, if the first one's inputs are not."""
    module, state, inputs = one_module(Dense(), Dense())
    outputs = updated(module, state, inputs.at[::2].set(jnp.nan), accumulate=2)[1]
    return [not np.isfinite(outputs[part::2]).all() for part in range(2)]


def test_a_micro_batch_waits_for_the_gradient_of_the_one_before():
    # Its parameters have the gradient of the one before added to them, times 0: the one order that XLA's CPU compiler keeps.
    assert spoilt_outputs() == [True, True]


def test_twin_without_an_order_a_micro_batch_does_not_wait(monkeypatch):
    monkeypatch.setattr(step, "after", lambda tree, first: tree)
    assert spoilt_outputs() == [True, False]


def exchanged(devices, monkeypatch=None):
    """Whether two devices that share a batch send each other examples during an update in two parts."""
    module, state, inputs = one_module(Dense(), Dense())
    group = one_group(devices[:2], 1)
    assert group.split(0) == NamedSharding(group.groups[0], PartitionSpec("batch"))
    everywhere, split = group.replicated(0), group.split(0)
    jitted = jax.jit(
        partial(local_step, module, OPTIMIZER, accumulate=2),
        in_shardings=(everywhere, split, split),
    )
    text = jitted.lower(state, inputs, TARGETS).compile().as_text()
    assert "all-reduce" in text  # gradients
    return any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_devices_that_share_a_batch_exchange_no_example(devices):
    assert not exchanged(devices)


def test_twin_halves_in_place_of_every_second_example_are_exchanged(devices, monkeypatch):
    halves = lambda tree, parts: [
        jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], tree) for i in range(parts)
    ]
    monkeypatch.setattr(step, "_split", halves)
    monkeypatch.setattr(step, "_join", jnp.concatenate)
    assert exchanged(devices)


@pytest.mark.parametrize(
    ("engine", "sizes", "parts", "works"),
    [
        (
            "fused",
            (),
            3,
            "the 2 images per device of module_0 into micro-batches of at least 2 images; 1, 2 would do",
        ),
        (
            "pipeline",
            (1, 2),
            8,
            "the 8 images per device of module_0 into micro-batches of at least 2 images; 1, 2, 4 would do",
        ),
        ("pipeline", (2, 1), 8, "the 4 images per device of module_0"),
        ("simulated", (), 5, "the 8 images per device of module_0"),
        ("backprop", (), 8, "1, 2 would do"),
    ],
)
def test_parts_that_do_not_divide_a_batch(engine, sizes, parts, works):
    fields = {"engine__name": engine, "engine__group_sizes": sizes, "train__accumulate": parts}
    with pytest.raises(
        UserError, match=rf"config\.train\.accumulate={parts}: must divide .*"
    ) as error:
        make_experiment(make_settings(small_config(**fields)))
    assert works in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_that_do(devices):
    check_batch(8, one_group(devices, 1).sizes(), 2)
    check_batch(8, one_group(devices[:1], 1).sizes(), 4)


# All together, in every engine

STEPS = 3
OPTIONS = {"accumulate": 2, "label_smoothing": 0.1, "ema": 0.5}


@pytest.fixture(scope="module")
def spec(tiny):
    """Of `modules` modules with every option on, and no convolution."""

    def make(modules=2, label_smoothing=OPTIONS["label_smoothing"], **changes):
        heads = [Classifier(Logits(), label_smoothing)] * modules
        own = make_modules([Dense(), Normal(), Dense(0.5)], (0, 2)[:modules], heads, remat=True)
        return dataclasses.replace(
            tiny.spec(modules), modules=own, **({"accumulate": 2, "ema": 0.5} | changes)
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
def test_pipeline_is_fused_bit_for_bit(tiny, devices, spec, fused):
    assert same(tiny.run(PipelineEngine(spec(), assign(devices, 2, (1, 1))), STEPS), fused)


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_twin_without_an_option_it_is_not(tiny, devices, spec, fused, option):
    off = spec(**{option: 1 if option == "accumulate" else 0.0})
    made = FusedEngine(off, one_group(devices[:1], 2))
    states, _ = tiny.run(made, STEPS)
    assert same([s.params for s in states], [s.params for s in fused[0]]) == (option == "ema"), (
        "an average is no part of training"
    )
    assert not same(states, fused[0])


@pytest.mark.full_compile
def test_ordered_turns_and_rings_of_one_are_fused_bit_for_bit(tiny, devices, spec, fused, to_host):
    made = SimulatedEngine(
        spec(),
        one_group(devices[:1], 2),
        STEPS,
        SimulatedOptions(order="ordered"),
        ReplaySettings(1),
    )
    state = made.resume(tiny.place(made, tiny.init(made.spec)), None)
    for report in made.run(state, tiny.source, STEPS):
        state = report.snapshot()
    assert same(to_host(state.modules), fused[0])


@pytest.mark.full_compile
@pytest.mark.slow
def test_backprop_of_one_module_is_fused_of_one_module(tiny, devices, spec):
    placement = one_group(devices[:1], 1)
    found = tiny.run(FusedEngine(dataclasses.replace(spec(1), method=Backprop()), placement), STEPS)
    assert same(found, tiny.run(FusedEngine(spec(1), placement), STEPS))


@pytest.mark.slow
def test_two_devices_are_one_within_rounding(tiny, devices, spec):
    one, two = (tiny.run(FusedEngine(spec(1), one_group(devices[:n], 1)), 1) for n in (1, 2))
    assert furthest([s.params for s in two[0]], [s.params for s in one[0]]) < 1e-5


def test_threads_keep_an_average_too(tiny, devices, spec, to_host):
    made = ThreadsEngine(spec(), assign(devices, 2, (1, 1)), ThreadsOptions(), ReplaySettings(2))
    *_, last = made.run(
        made.resume(tiny.place(made, tiny.init(made.spec)), None), tiny.source, STEPS
    )
    state = last.snapshot()
    assert counts(state) == [STEPS] * 2
    for module in to_host(state.modules):
        averaged, _ = ema.evaluated(module)
        assert 1e-6 < furthest(averaged, module.params) < 1.0


# The average


@pytest.fixture(scope="module")
def history(tiny, devices, spec):
    """The states after each of three updates; averages with decay 0.9."""
    engine = FusedEngine(spec(ema=0.9, accumulate=1), one_group(devices[:1], 2))
    states, found = None, []
    for until in (1, 2, 3):
        states, _ = tiny.run(engine, until, states)
        found.append(states)
    return engine, found


def weighted(history, k, weights):
    kept = [(states[k].params, states[k].batch_stats) for states in history]
    return jax.tree.map(lambda *x: np.average(np.float64(x), axis=0, weights=weights), *kept)


def test_an_average_by_hand(history):
    _, found = history
    for k in range(2):
        for n, weights in enumerate(([1], [0.9, 1], [0.81, 0.9, 1]), 1):
            averaged = ema.evaluated(found[n - 1][k])
            assert furthest(averaged, weighted(found[:n], k, weights)) < 1e-6
        assert (
            furthest(ema.evaluated(found[-1][k]), weighted(found, k, [1, 1, 1])) > 1e-5
        )  # another decay
        assert (
            furthest(ema.evaluated(found[-1][k]), (found[-1][k].params, found[-1][k].batch_stats))
            > 1e-4
        )


def test_without_an_average_a_module_is_evaluated_as_it_is(tiny):
    (state, *_) = tiny.init(tiny.spec())
    assert ema.evaluated(state) == (state.params, state.batch_stats)


def test_evaluation_takes_the_average(tiny, history):
    engine, found = history
    evaluator = Evaluator(engine.spec, engine.placement)

    def losses(states):
        scores = evaluator.evaluate(tiny.place(engine, states), tiny.source, "test")
        return [value for name, value in scores.items() if name.endswith("loss")]

    averaged = losses(found[-1])
    bare = tuple(s.replace(extras={}) for s in found[-1])
    by_hand = tuple(
        s.replace(
            **dict(
                zip(
                    ("params", "batch_stats"),
                    jax.tree.map(np.float32, weighted(found, k, [0.81, 0.9, 1])),
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
def test_a_run_with_everything_on_resumes_exactly(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    train_and_evaluate(small_config(**RUN), tmp_path / "run")
    assert same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_twin_an_average_that_begins_anew_is_noticed(whole, stopped, tmp_path, monkeypatch):
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
def test_another_decay_is_refused_by_name(whole):
    with pytest.raises(UserError, match=r"config\.train\.ema \(was 0\.9, is now 0\.0\)"):
        train_and_evaluate(small_config(**RUN | {"train__ema": 0.0}), whole)


@pytest.mark.slow
def test_what_is_exported_borrowed_and_measured_is_the_average(whole, tmp_path):
    trained = load_trained(whole)
    exported = load_exported(export_run(whole, output=tmp_path))
    borrowed = borrow_weights(trained.spec, trained.restored.state, trained)
    for module, variables, mine in zip(
        trained.restored.state.modules, exported.variables, borrowed.modules
    ):
        kept = {name: module.extras["ema"][name] for name in ("params", "batch_stats")}
        assert same({name: variables[name] for name in kept}, kept)
        assert same((mine.params, mine.batch_stats), (kept["params"], kept["batch_stats"]))
        assert not same(kept["params"], module.params)
    summary = json.loads((whole / "summary.json").read_text())
    measured = evaluate_run(whole)
    assert [measured[f"test/module_{k}/accuracy"] for k in range(2)] == [
        m["test_accuracy"] for m in summary["modules"]
    ]
