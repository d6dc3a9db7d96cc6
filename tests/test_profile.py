"""What blocks and modules cost, and the cuts that follow from it: chosen once, kept for as long as a run lives."""

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

from dgl_jax import system, train
from dgl_jax.config import make_settings
from dgl_jax.core.module import LocalModule, init_states
from dgl_jax.core.step import backward_step, local_step, loss_step
from dgl_jax.errors import UserError
from dgl_jax.export import export_run, load_exported
from dgl_jax.models import BlockCosts
from dgl_jax.profile import flops, memory, table
from dgl_jax.profile import timing as costs
from dgl_jax.run import build
from dgl_jax.run.build import DatasetInfo, choose_cuts, make_blocks, make_spec
from dgl_jax.run.restore import load_trained
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import nbytes

INFO = DatasetInfo("cifar10", tuple("0123456789"), (32, 32, 3), (0.5,) * 3, (0.5,) * 3)
SMALL = DatasetInfo("synthetic", tuple("0123456789"), (8, 8, 3), (0.5,) * 3, (0.5,) * 3)


def small(**fields):
    return make_settings(small_config(**fields))


# Operations

CNN6 = [
    (32, 3, 128),
    (16, 128, 256),
    (16, 256, 256),
    (8, 256, 512),
    (8, 512, 512),
    (8, 512, 512),
]  # side, channels in and out


def test_operations_by_hand():
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
    (first, of_head), (second, classifier) = flops.module_flops(spec)
    assert first / 2 == sum(convolutions[:3])
    assert second / 2 == sum(convolutions[3:])
    assert of_head / 2 == 2 * 256 * 10
    assert classifier / 2 == 2 * (
        2 * 2048**2 + 2048 * 10
    )  # of 2x2 averages: two hidden layers of 2048, and the logits


@pytest.mark.parametrize("starts", [(0, 1, 2, 3), (0, 2), (0, 3), (0,)])
def test_modules_cost_what_their_blocks_do(starts):
    settings = small(model__head="mlp")
    blocks = flops.block_flops(make_blocks(settings, SMALL))
    spec = make_spec(settings, SMALL, starts)
    modules = [blocks.module(a, b) for a, b in itertools.pairwise([*starts, 4])]
    assert [body + head for body, head in flops.module_flops(spec)] == pytest.approx(
        modules, rel=1e-12
    )


def test_heads_that_are_not_trained_cost_nothing():
    blocks = flops.block_flops(make_blocks(small(method__name="backprop"), SMALL))
    assert blocks.head[:3] == (0, 0, 0)
    assert blocks.head[3] > 0


def slowest(settings, starts):
    return max(body + head for body, head in flops.module_flops(make_spec(settings, SMALL, starts)))


@pytest.mark.parametrize(("head", "modules"), [("linear", 2), ("cnn", 2), ("cnn", 3)])
def test_a_split_by_flops_has_the_fastest_slowest_module(head, modules):
    settings = small(model__head=head, model__modules=modules, model__split="flops")
    chosen = choose_cuts(settings, make_blocks(settings, SMALL))
    every = [(0, *others) for others in itertools.combinations(range(1, 4), modules - 1)]
    assert slowest(settings, chosen) == min(slowest(settings, starts) for starts in every)
    assert [module.first for module in spec_of(settings, SMALL).modules] == list(chosen)
    assert slowest(settings, chosen) < max(slowest(settings, starts) for starts in every)


def test_codecs_need_not_fit_where_nobody_cuts():
    settings = small(
        codec__name="int8", codec__dims=8, model__split="flops"
    )  # the first block has 4 channels
    assert choose_cuts(settings, make_blocks(settings, SMALL)) in [(0, 2), (0, 3)]


# Time


@pytest.mark.full_compile
@pytest.mark.slow
def test_the_parts_of_a_step_are_the_step(tiny):
    """Head and body, one after the other, do what a local step does."""
    block, head = tiny.spec().modules[1].blocks[0], tiny.spec().modules[1].objective
    optimizer, x = optax.sgd(0.1), jax.random.normal(jax.random.key(1), (8, 4, 4, 4))
    whole, body, end = (
        LocalModule("m", 0, blocks, of_module)
        for blocks, of_module in (((block,), head), ((block,), None), ((), head))
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
        of_head, cotangent, _ = loss_step(
            end, optimizer, part("objective", {}), outputs, {"label": label}
        )
        of_body, handed_on, _ = backward_step(
            body, optimizer, part("body", None), x, scale * cotangent
        )
        return (
            of_body.params["body"],
            of_head.params["objective"],
            of_body.batch_stats["body"],
            handed_on,
        )

    expected, outputs, _ = jax.jit(lambda s: local_step(whole, optimizer, s, x, {"label": label}))(
        state
    )
    wanted = (
        expected.params["body"],
        expected.params["objective"],
        expected.batch_stats["body"],
        outputs,
    )
    close = lambda found: jax.tree.all(
        jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    )
    assert close(parts(1.0))
    assert not close(parts(0.0)), "a gradient that never reaches the body went unnoticed"


@pytest.fixture
def stopwatch(monkeypatch):
    """Instead of running programs: checks what they take and give, and says that the n-th takes n seconds and 2 n of processor."""
    asked = []

    def clocked(program, state, *inputs, repeats, company):
        results = program.out_info
        assert jax.tree.map(jnp.shape, results[0]) == jax.tree.map(jnp.shape, state)
        asked.append((inputs[0].shape, "inner" if results[2] is not None else "first"))
        if results[2] is not None:
            assert results[2].shape == inputs[0].shape
        return costs.Elapsed(len(asked), 2.0 * len(asked)), results

    monkeypatch.setattr(costs, "clocked", clocked)
    return asked


def test_equal_layers_are_measured_once(stopwatch, tiny):
    plain = tiny.spec()
    block, head = plain.modules[0].blocks[0], plain.modules[0].objective
    network = flops.Blocks((block,) * 4, (head,) * 4, plain.inputs())  # 3, then 4, 4, 4 channels
    times = costs.block_times(network, plain.optimizer, jax.devices()[0])
    assert stopwatch == [
        ((8, 4, 4, 3), "first"),
        ((8, 4, 4, 4), "inner"),  # the head
        ((8, 4, 4, 4), "first"),
        ((8, 4, 4, 4), "inner"),
    ]
    assert times.seconds == BlockCosts((1, 3, 3, 3), (1, 4, 4, 4), (2, 2, 2, 2))
    assert times.processor == BlockCosts((2, 6, 6, 6), (2, 8, 8, 8), (4, 4, 4, 4))


def test_what_needs_more_memory_than_is_free_is_not_run(stopwatch, tiny, monkeypatch):
    spec, needed = tiny.spec(), []
    network = flops.Blocks(spec.modules[0].blocks, (spec.modules[0].objective,), spec.inputs())
    monkeypatch.setattr(
        costs, "_needed", lambda *args, of=costs._needed: needed.append(of(*args)) or needed[-1]
    )
    costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 2
    monkeypatch.setattr(system, "free_memory", lambda: max(needed))
    costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 4
    monkeypatch.setattr(system, "free_memory", lambda: needed[0] - 1)
    with pytest.raises(
        UserError,
        match=r"config.data.batch_size=8: to measure a ConvBlock on inputs of 8 x 4 x 4 x 3 would take",
    ):
        costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 4
    monkeypatch.setattr(system, "free_memory", lambda: None)  # nobody knows, so nobody forbids
    costs.block_times(network, spec.optimizer, jax.devices()[0])
    assert len(stopwatch) == 6


def test_memory_of_programs_in_company():
    """Each has its own scratch and results; the inputs are the same."""
    program = (
        jax.jit(lambda x: jnp.sort(x) + jnp.sort(-x)[::-1])
        .lower(jax.ShapeDtypeStruct((1024,), "float32"))
        .compile()
    )
    scratch = system.program_plan(program).temporary
    assert scratch > 0
    assert [costs._needed(program, company) for company in (1, 3)] == [
        4096 + n * (4096 + scratch) for n in (1, 3)
    ]


@pytest.mark.slow
def test_a_split_by_time_follows_the_clock(stopwatch, caplog):
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
    assert max(seconds.module(0, chosen[1]), seconds.module(chosen[1], 4)) == min(
        max(seconds.module(0, cut), seconds.module(cut, 4)) for cut in (1, 2, 3)
    )


def test_the_clock():
    elapsed, (state, seen) = costs.clocked(
        jax.jit(lambda s, x: (s + x, s), donate_argnums=0), jnp.zeros(4), jnp.ones(4), repeats=3
    )
    np.testing.assert_array_equal(state, 2 * 4)  # a pair to compile, three by the clock
    np.testing.assert_array_equal(seen, 2 * 4 - 1)
    assert elapsed.seconds > 0


def test_the_clock_in_company():
    """Copies of the program work at once, each on a state of its own, and what is given back is the state of the one alone."""
    together, active = threading.Barrier(3), []

    def program(state, x):
        if threading.current_thread() is not threading.main_thread():
            active.append(threading.get_ident())
            together.wait(60)  # passes only where three are under way
        return step(state, x)

    step = jax.jit(lambda s, x: (s + x, s), donate_argnums=0)
    elapsed, (state, _) = costs.clocked(program, jnp.zeros(4), jnp.ones(4), repeats=3, company=3)
    np.testing.assert_array_equal(state, 2 * 4)
    assert len(active) == 3 * 3
    assert len(set(active)) == 3
    assert elapsed.processor > 0


def test_processor_time_is_of_one_call_in_company(monkeypatch):
    moments = iter(
        [*range(0, 16, 4), *range(100, 104), 1000.0, 1060.0]
    )  # pairs of 4 s, then all copies in 60
    monkeypatch.setattr(costs.time, "process_time", lambda: next(moments))
    elapsed, _ = costs.clocked(
        lambda state, x: (state, x), jnp.zeros(2), jnp.ones(2), repeats=3, company=2
    )
    assert elapsed.processor == 60 / (3 * 2)


# Chosen once


@pytest.fixture
def times(monkeypatch):
    """Stands for measuring on a machine whose mood changes: the times of the next measurement, or None where there may be none."""
    mood = {"head": (0.0, 9.0, 9.0, 0.0)}  # so that cutting behind block 0 is best

    def block_times(network, optimizer, device):
        assert mood["head"] is not None, "measured again"
        ones = (1.0,) * 4
        return costs.BlockTimes(BlockCosts(ones, ones, mood["head"]), BlockCosts(ones, ones, ones))

    monkeypatch.setattr(build, "block_times", block_times)
    return mood


@pytest.mark.slow
def test_a_run_keeps_the_cuts_it_was_begun_with_and_shows_them(times, tmp_path, caplog):
    config = small_config(model__split="time", train__steps=6)
    interrupted(tmp_path, 4, config)
    times["head"] = None
    with caplog.at_level("INFO", logger="dgl_jax"):
        summary = train_and_evaluate(config, tmp_path)
    assert summary.steps == 6
    for spec in (load_trained(tmp_path).spec, load_exported(export_run(tmp_path)).spec):
        assert [module.first for module in spec.modules] == [0, 1]
        assert [
            line for line in table.table(table.module_costs(spec)) if line not in caplog.messages
        ] == []


@pytest.mark.slow
def test_twin_measuring_again_is_noticed(times, tmp_path, monkeypatch):
    config = small_config(model__split="time", train__steps=6)
    interrupted(tmp_path, 4, config)
    times["head"] = None
    monkeypatch.setattr(train, "newest_meta", lambda directory: {})
    with pytest.raises(AssertionError, match="measured again"):
        train_and_evaluate(config, tmp_path)


# Memory and the table


@pytest.mark.full_compile
@pytest.mark.slow
def test_memory_of_programs():
    spec = spec_of(small(data__batch_size=16), SMALL)
    first, second = memory.module_memory(spec)
    for k, (program, state) in enumerate(zip((first, second), spec.abstract_states())):
        held = nbytes((state.params, state.opt_state, state.batch_stats))
        assert program.packet == [16 * (8 * 8 * 3 + 8), 16 * (4 * 4 * 8 * 4 + 8)][k]
        # Besides: keys, counts, and 16 ids that nobody reads.
        assert program.arguments == pytest.approx(held + program.packet, abs=300)
        assert program.temporary > 0
    assert (
        second.packet <= first.added < second.packet + 500
    )  # the packet; loss, accuracy, pointers
    assert second.added < 500


def test_the_table(monkeypatch):
    monkeypatch.setattr(table, "module_flops", lambda spec: [(30e9, 10e9), (60e9, 20e9)])
    spec = spec_of(small(model__split="0,3", data__batch_size=10, codec__name="bf16"), SMALL)
    rows = table.module_costs(spec)
    body = [
        3 * 9 * 4 + 3 * 4 + 4 * 9 * 8 + 3 * 8 + 8 * 9 * 8 + 3 * 8,
        8 * 9 * 16 + 3 * 16,
    ]  # weights, biases, batch norm
    hidden = 2 * (64 * 64 + 64 + 2 * 64) + 64 * 10 + 10
    assert [row.body_parameters for row in rows] == body
    assert [row.parameters for row in rows] == [body[0] + 8 * 10 + 10, body[1] + hidden]
    assert [(row.first_block, row.blocks) for row in rows] == [(0, 3), (3, 1)]
    assert [(row.body_gflops, row.head_gflops, row.share) for row in rows] == [
        (3, 1, 0.5),
        (6, 2, 1),
    ]
    assert [(row.activation_bytes, row.wire_bytes) for row in rows] == [
        (4 * 4 * 8 * 4, 4 * 4 * 8 * 2 + 8),
        (None, None),
    ]
    assert [row.share for row in table.module_costs(spec, [4.0, 1.0])] == [1, 0.25]
    lines = table.table(rows)
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == [
        "module_0",
        "0-2",
        f"{rows[0].parameters:,}",
        "3",
        "1",
        "512",
        "264",
        "50",
        "%",
    ]
    assert lines[2].split() == [
        "module_1",
        "3",
        f"{rows[1].parameters:,}",
        "6",
        "2",
        "-",
        "-",
        "100",
        "%",
    ]
