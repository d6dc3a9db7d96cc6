"""Tests of the costs of blocks and modules, and of the splits that depend on them."""

import dataclasses
import itertools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import small_config, spec_of
from test_resume import interrupted

from dgl_jax import system
from dgl_jax.config import make_settings
from dgl_jax.core.module import LocalModule, init_states
from dgl_jax.core.step import backward_step, local_step, loss_step
from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.profile import flops, memory, table
from dgl_jax.profile import timing as costs
from dgl_jax.run import build, restore
from dgl_jax.run.build import DatasetInfo, choose_cuts, make_spec
from dgl_jax.run.parts import make_blocks
from dgl_jax.run.restore import load_trained
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import nbytes

INFO = DatasetInfo("cifar10", tuple("0123456789"), (32, 32, 3), (0.5,) * 3, (0.5,) * 3)
SMALL = DatasetInfo("synthetic", tuple("0123456789"), (8, 8, 3), (0.5,) * 3, (0.5,) * 3)


def small(**fields):
    """Returns the settings of the small run with four blocks, whose costs differ."""
    return make_settings(small_config(**{"model__name": "cnn4"} | fields))


# Operations

# Side length of the map, channels in and channels out, per block.
CNN6 = [(32, 3, 128), (16, 128, 256), (16, 256, 256), (8, 256, 512), (8, 512, 512), (8, 512, 512)]


def test_operations_of_modules_equal_counts_by_hand():
    spec = spec_of(
        small(
            model__name="cnn6",
            model__width=128,
            model__modules=2,
            model__head="linear",
            data__batch_size=2,
        ),
        INFO,
    )
    convolutions = [2 * 9 * i * o * h**2 for h, i, o in CNN6]
    (first, head), (second, classifier) = flops.module_flops(spec)
    assert first / 2 == sum(convolutions[:3])
    assert second / 2 == sum(convolutions[3:])
    assert head / 2 == 2 * 256 * 10
    # After the 2x2 average: two hidden layers of 2048 units, and the logits.
    assert classifier / 2 == 2 * (2 * 2048**2 + 2048 * 10)


@pytest.mark.parametrize("starts", [(0, 1, 2, 3), (0, 2), (0, 3), (0,)])
def test_operations_of_a_module_are_the_sum_over_its_blocks(starts):
    settings = small(model__head="mlp")
    blocks = flops.block_flops(make_blocks(settings, SMALL))
    spec = make_spec(settings, SMALL, starts)
    assert [body + head for body, head in flops.module_flops(spec)] == pytest.approx(
        blocks.modules(starts), rel=1e-12
    )


def test_heads_cost_nothing_if_the_method_does_not_train_them():
    blocks = flops.block_flops(make_blocks(small(method__name="backprop"), SMALL))
    (heads,) = blocks.heads
    assert heads[:3] == (0, 0, 0)
    assert heads[3] > 0


def slowest(settings, starts):
    return max(body + head for body, head in flops.module_flops(make_spec(settings, SMALL, starts)))


@pytest.mark.medium
@pytest.mark.parametrize(("head", "modules"), [("linear", 2), ("cnn", 2), ("cnn", 3)])
def test_split_by_flops_minimizes_the_slowest_module(head, modules):
    settings = small(model__head=head, model__modules=modules, model__split="flops")
    chosen = choose_cuts(settings, make_blocks(settings, SMALL))
    every = [(0, *later) for later in itertools.combinations(range(1, 4), modules - 1)]
    assert slowest(settings, chosen) == min(slowest(settings, starts) for starts in every)
    assert [module.first for module in spec_of(settings, SMALL).modules] == list(chosen)
    assert slowest(settings, chosen) < max(slowest(settings, starts) for starts in every)


def test_codec_need_not_fit_blocks_that_are_not_cut():
    # The codec cannot encode the 4 channels of the first block.
    settings = small(codec__name="int8", codec__dims=8, model__split="flops")
    assert choose_cuts(settings, make_blocks(settings, SMALL)) in [(0, 2), (0, 3)]


# Time


@pytest.mark.full_compile
@pytest.mark.slow
def test_head_and_body_programs_together_equal_a_local_step(tiny):
    """Compares the two measured programs, one after the other, with `local_step`."""
    block, head = tiny.spec().modules[1].blocks[0], tiny.spec().modules[1].objective
    optimizer, x = optax.sgd(0.1), jax.random.normal(jax.random.key(1), (8, 4, 4, 4))
    whole, body, end = (
        LocalModule("m", 0, blocks, objective)
        for blocks, objective in (((block,), head), ((block,), None), ((), head))
    )
    label = jnp.arange(8)
    (state,) = init_states(
        [whole], optimizer, jax.random.key(0), jax.ShapeDtypeStruct(x.shape, x.dtype)
    )

    def part(name, other):
        tree = {
            key: (value if key == name else other)
            for key, value in state.params.items()
            if key == name or other is not None
        }
        stats = {
            key: (value if key == name else other)
            for key, value in state.batch_stats.items()
            if key in tree
        }
        return dataclasses.replace(
            state, params=tree, batch_stats=stats, opt_state=optimizer.init(tree)
        )

    @jax.jit
    def parts(scale):
        outputs, _ = whole.apply_body(state.params, state.batch_stats, x, train=True)
        head_state, cotangent, _ = loss_step(
            end, optimizer, part("objective", {}), outputs, {"label": label}
        )
        body_state, outputs, _ = backward_step(
            body, optimizer, part("body", None), x, scale * cotangent
        )
        return (
            body_state.params["body"],
            head_state.params["objective"],
            body_state.batch_stats["body"],
            outputs,
        )

    new, outputs, _ = jax.jit(lambda s: local_step(whole, optimizer, s, x, {"label": label}))(state)
    expected = new.params["body"], new.params["objective"], new.batch_stats["body"], outputs

    def close(actual):
        return jax.tree.all(
            jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)
        )

    assert close(parts(1.0))
    assert not close(parts(0.0)), "the twin without a gradient for the body passed"


@pytest.fixture
def stopwatch(monkeypatch):
    """Replaces the clock: checks the shapes of each program instead of running it.

    The n-th program takes n seconds of wall time and 2 n seconds of CPU time.
    """
    asked = []

    def clocked(program, state, *inputs, repeats, concurrency):
        results = program.out_info
        assert jax.tree.map(jnp.shape, results[0]) == jax.tree.map(jnp.shape, state)
        asked.append((inputs[0].shape, "inner" if results[2] is not None else "first"))
        if results[2] is not None:
            assert results[2].shape == inputs[0].shape
        return costs.Elapsed(len(asked), 2.0 * len(asked)), results

    monkeypatch.setattr(costs, "clocked", clocked)
    return asked


def test_equal_layers_are_measured_once(stopwatch, tiny):
    spec = tiny.spec()
    block, head = spec.modules[0].blocks[0], spec.modules[0].objective
    # The input channels of the blocks are 3, 4, 4 and 4.
    network = flops.Blocks((block,) * 4, ((head,) * 4,), spec.inputs())
    times = costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert stopwatch == [
        ((8, 4, 4, 3), "first"),
        ((8, 4, 4, 4), "inner"),  # the head
        ((8, 4, 4, 4), "first"),
        ((8, 4, 4, 4), "inner"),
    ]
    assert times.seconds == BlockCosts((1, 3, 3, 3), (1, 4, 4, 4), ((2, 2, 2, 2),))
    assert times.processor == BlockCosts((2, 6, 6, 6), (2, 8, 8, 8), ((4, 4, 4, 4),))


def test_programs_that_need_more_than_the_free_memory_are_refused(stopwatch, tiny, monkeypatch):
    spec, needed = tiny.spec(), []
    network = flops.Blocks(spec.modules[0].blocks, ((spec.modules[0].objective,),), spec.inputs())
    original = costs._needed
    monkeypatch.setattr(
        costs, "_needed", lambda *args: needed.append(original(*args)) or needed[-1]
    )
    costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 2
    monkeypatch.setattr(system, "free_memory", lambda: max(needed))
    costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 4
    monkeypatch.setattr(system, "free_memory", lambda: needed[0] - 1)
    with pytest.raises(
        UserError,
        match=r"config.data.batch_size=8: measuring a ConvBlock on inputs of 8 x 4 x 4 x 3 would",
    ):
        costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 4
    monkeypatch.setattr(system, "free_memory", lambda: None)  # unknown free memory allows all
    costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 6


def test_copies_of_a_program_share_their_arguments_only():
    """Checks the memory of copies, which have separate temporary buffers and results."""
    program = (
        jax.jit(lambda x: jnp.sort(x) + jnp.sort(-x)[::-1])
        .lower(jax.ShapeDtypeStruct((1024,), "float32"))
        .compile()
    )
    temporary = system.program_plan(program).temporary
    assert temporary > 0
    assert [costs._needed(program, concurrency) for concurrency in (1, 3)] == [
        4096 + n * (4096 + temporary) for n in (1, 3)
    ]


@pytest.mark.slow
def test_split_by_time_minimizes_the_measured_time(stopwatch, caplog):
    settings = small(model__modules=2, model__split="time", model__head="linear")
    with caplog.at_level("INFO", logger="dgl_jax"):
        chosen = choose_cuts(settings, make_blocks(settings, SMALL))
    assert re.search(
        r"config\.model\.split=time: measuring every block and head on \S+ 0", caplog.text
    )
    assert f"the modules begin at blocks {','.join(map(str, chosen))}" in caplog.text
    stopwatch.clear()
    seconds = costs.block_times(
        make_blocks(settings, SMALL), optax.sgd(0.1, momentum=0.9), jax.devices()[0]
    ).seconds
    assert max(seconds.modules(chosen)) == min(max(seconds.modules((0, cut))) for cut in (1, 2, 3))


def test_clock_measures_pairs_of_calls_after_a_first_pair():
    elapsed, (state, seen) = costs.clocked(
        jax.jit(lambda s, x: (s + x, s), donate_argnums=0), jnp.zeros(4), jnp.ones(4), repeats=3
    )
    np.testing.assert_array_equal(state, 2 * 4)  # one pair that compiles, three measured pairs
    np.testing.assert_array_equal(seen, 2 * 4 - 1)
    assert elapsed.seconds > 0


def test_slow_programs_are_measured_less_often(monkeypatch):
    moments = itertools.count(0, 6)  # each pair takes 6 s
    monkeypatch.setattr(costs.time, "perf_counter", lambda: float(next(moments)))
    calls = []

    def program(state, x):
        calls.append(threading.get_ident())
        return state, x

    elapsed, _ = costs.clocked(program, jnp.zeros(2), jnp.ones(2), repeats=7, concurrency=2)
    assert elapsed.seconds == 3
    assert calls.count(threading.get_ident()) == 2 * 3  # a first pair, and two measured ones
    assert len(calls) == 2 * 3 + 2 * 2  # two copies, with as many calls


def test_clock_runs_copies_at_once_and_returns_the_state_of_the_single_run():
    """Checks that each copy has its own state and that all copies are in flight together."""
    together, active = threading.Barrier(3), []

    def program(state, x):
        if threading.current_thread() is not threading.main_thread():
            active.append(threading.get_ident())
            together.wait(60)  # passes only if three threads are in their call
        return step(state, x)

    step = jax.jit(lambda s, x: (s + x, s), donate_argnums=0)
    elapsed, (state, _) = costs.clocked(
        program, jnp.zeros(4), jnp.ones(4), repeats=3, concurrency=3
    )
    np.testing.assert_array_equal(state, 2 * 4)
    assert len(active) == 3 * 3
    assert len(set(active)) == 3
    assert elapsed.processor > 0


def test_cpu_time_is_divided_by_the_calls_of_all_copies(monkeypatch):
    # Eight times for the four pairs of the single run, then 60 s for all calls of the copies.
    moments = iter([*range(0, 16, 4), *range(100, 104), 1000.0, 1060.0])
    monkeypatch.setattr(costs.time, "process_time", lambda: next(moments))
    elapsed, _ = costs.clocked(
        lambda state, x: (state, x), jnp.zeros(2), jnp.ones(2), repeats=3, concurrency=2
    )
    assert elapsed.processor == 60 / (3 * 2)


# Cuts are chosen once per run


@pytest.fixture
def times(monkeypatch):
    """Replaces measuring by fixed times, which a test may change; None forbids measuring."""
    fixed = {"head": (0.0, 9.0, 9.0, 0.0)}  # the best cut is after block 0

    def block_times(network, optimizer, device):
        assert fixed["head"] is not None, "measured again"
        ones = (1.0,) * 4
        return costs.BlockTimes(*(BlockCosts(ones, ones, (row,)) for row in (fixed["head"], ones)))

    monkeypatch.setattr(build, "block_times", block_times)
    return fixed


@pytest.mark.slow
def test_resumed_run_keeps_its_cuts_and_logs_the_table(times, tmp_path, caplog):
    config = small_config(model__split="time", train__steps=6)
    interrupted(tmp_path, 4, config)
    times["head"] = None
    with caplog.at_level("INFO", logger="dgl_jax"):
        summary = train_and_evaluate(config, tmp_path)
    assert summary.steps == 6
    for spec in (load_trained(tmp_path).spec, load_exported(export_run(tmp_path)).spec):
        assert [module.first for module in spec.modules] == [0, 1]
        assert set(table.table(table.module_costs(spec))) <= set(caplog.messages)


@pytest.mark.slow
def test_twin_measuring_again_on_resume_fails(times, tmp_path, monkeypatch):
    config = small_config(model__split="time", train__steps=6)
    interrupted(tmp_path, 4, config)
    times["head"] = None
    monkeypatch.setattr(restore, "newest_meta", lambda directory: {})
    with pytest.raises(AssertionError, match="measured again"):
        train_and_evaluate(config, tmp_path)


# Memory and the table


@pytest.mark.full_compile
@pytest.mark.slow
def test_planned_memory_of_programs_equals_the_sizes_of_arrays():
    spec = spec_of(small(data__batch_size=16), SMALL)
    first, second = memory.module_memory(spec)
    for k, (program, state) in enumerate(zip((first, second), spec.abstract_states())):
        held = nbytes((state.params, state.opt_state, state.batch_stats))
        assert program.message == [16 * (8 * 8 * 3 + 8), 16 * (4 * 4 * 8 * 4 + 8)][k]
        # The tolerance allows for keys, counters, and 16 ids that the program does not read.
        assert program.arguments == pytest.approx(held + program.message, abs=300)
        assert program.temporary > 0
    # The rest of `added` is loss, accuracy and pointers.
    assert second.message <= first.added < second.message + 500
    assert second.added < 500


def test_table_shows_the_costs_of_modules(monkeypatch):
    monkeypatch.setattr(table, "module_flops", lambda spec: [(30e9, 10e9), (60e9, 20e9)])
    spec = spec_of(small(model__split="0,3", data__batch_size=10, codec__name="bf16"), SMALL)
    rows = table.module_costs(spec)
    # Weights and, per channel, three values of biases and batch norm.
    body = [3 * 9 * 4 + 3 * 4 + 4 * 9 * 8 + 3 * 8 + 8 * 9 * 8 + 3 * 8, 8 * 9 * 16 + 3 * 16]
    hidden = 2 * (64 * 64 + 64 + 2 * 64) + 64 * 10 + 10
    assert [row.body_parameters for row in rows] == body
    assert [row.parameters for row in rows] == [body[0] + 8 * 10 + 10, body[1] + hidden]
    assert [(row.first_block, row.blocks) for row in rows] == [(0, 3), (3, 1)]
    operations = [(row.body_gflops, row.head_gflops, row.share) for row in rows]
    assert operations == [(3, 1, 0.5), (6, 2, 1)]
    assert [(row.activation_bytes, row.wire_bytes) for row in rows] == [
        (4 * 4 * 8 * 4, 4 * 4 * 8 * 2 + 8),
        (None, None),
    ]
    assert [row.share for row in table.module_costs(spec, [4.0, 1.0])] == [1, 0.25]
    # Weights and momentum, running means and variances of 20 and 16 + 2 * 64 channels, a key of two
    # words, and the number of updates, which the schedule counts too.
    averages = [2 * 20, 2 * (16 + 2 * 64)]
    states = [4 * (2 * row.parameters + n + 2 + 2) for row, n in zip(rows, averages)]
    assert [row.state_bytes for row in rows] == states
    lines = table.table(rows)
    assert len({len(line) for line in lines}) == 1
    parameters = [f"{row.parameters:,}" for row in rows]
    first = ["module_0", "0-2", parameters[0], "3", "1", "512", "264", f"{states[0]:,}", "50", "%"]
    second = ["module_1", "3", parameters[1], "6", "2", "-", "-", f"{states[1]:,}", "100", "%"]
    assert [line.split() for line in lines[1:]] == [first, second]
