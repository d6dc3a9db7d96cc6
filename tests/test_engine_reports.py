"""Tests of the synchronous engines' reports, traces, and waits of the host."""

import jax
import pytest
from test_engines import ONE_EACH, STEPS

from dgl_jax.engines import EngineState, synchronous
from dgl_jax.engines.base import counts
from dgl_jax.run import metrics
from dgl_jax.run.metrics import Window
from dgl_jax.types import Inbox

pytestmark = pytest.mark.full_compile


def programs_of(run):
    steps = [(k, "step") for k in range(len(run.spec.modules))]
    return (
        [run.programs[step] for step in steps]
        if hasattr(run, "programs")
        else [run.steps[tuple(steps)]]
    )


def traces(run):
    return [program._cache_size() for program in programs_of(run)]


@pytest.mark.medium
@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_each_program_is_traced_once(tiny, name):
    run = tiny.engine(name, modules=1) if name == "fused" else tiny.engine(name, ONE_EACH[3])
    for program in programs_of(run):
        program.clear_cache()
    state = tiny.place(run, tiny.init(run.spec))
    for until in (2, 3, 5):  # segments, as between evaluations
        *_, last = run.run(state, tiny.source, until)
        state = last.snapshot()
    assert set(traces(run)) == {1}
    # Twin: a batch of another size causes a second trace.
    batch = jax.tree.map(lambda x: x[:4] if x.ndim else x, tiny.source.batch(0))
    moved = run.placement.put_batch(batch, 0)
    if name == "fused":
        programs_of(run)[0](state.modules, moved)
    else:
        programs_of(run)[0](state.modules[0], Inbox(moved), moved.context)
    assert traces(run)[0] == 2


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_reports_count_updates_and_only_the_last_returns_a_snapshot(tiny, name):
    run = tiny.engine(name, ONE_EACH[3] if name == "pipeline" else ())
    state = tiny.place(run, tiny.init(run.spec))
    reports = list(run.run(state, tiny.source, STEPS))
    assert [report.updates for report in reports] == [(step,) * 3 for step in range(1, STEPS + 1)]
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert all(
        set(module_metrics) == {"loss", "accuracy"}
        for report in reports
        for module_metrics in report.metrics
    )
    for report in reports[:-1]:
        with pytest.raises(RuntimeError, match="in flight"):
            report.snapshot()
    state = reports[-1].snapshot()
    assert isinstance(state, EngineState)
    assert set(counts(state)) == {STEPS}
    assert list(run.run(state, tiny.source, STEPS)) == []
    assert list(run.run(state, tiny.source, STEPS + 1, stop=lambda: True)) == []
    assert set(counts(state)) == {STEPS}  # a run without turns does not donate the state


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_host_waits_once_per_tick_and_reads_once_per_record(tiny, monkeypatch, name):
    steps, log_every, modules = 8, 4, 3
    run = tiny.engine(name, ONE_EACH[3] if name == "pipeline" else ())
    state = tiny.place(run, tiny.init(run.spec))
    waits, reads, block, read = [], [], jax.block_until_ready, metrics.read
    monkeypatch.setattr(
        jax,
        "block_until_ready",
        lambda tree: waits.append(len(jax.tree.leaves(tree))) or block(tree),
    )
    monkeypatch.setattr(metrics, "read", lambda tree: reads.append(len(tree)) or read(tree))
    window = Window()
    for report in run.run(state, tiny.source, steps):
        window.add(report)
        if report.updates[-1] % log_every == 0:
            window.close()
    # One wait per tick, for the sum and count of two metrics of each module that worked in it, and
    # one read per log record.
    ticks = steps + (modules - 1 if name == "pipeline" else 0)
    assert len(waits) == ticks
    assert max(waits) == 4 * modules
    assert sum(waits) == 4 * modules * steps
    assert reads == [log_every] * (steps // log_every)


def test_host_runs_ahead_by_ticks_in_flight(tiny, monkeypatch):
    run = tiny.engine("fused")
    events, (step,), block = [], programs_of(run), jax.block_until_ready
    turns = tuple((k, "step") for k in range(len(run.spec.modules)))
    monkeypatch.setitem(run.steps, turns, lambda *args: events.append("dispatch") or step(*args))
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: events.append("wait") or block(tree))
    tiny.run(run, 5)
    assert run.ticks_in_flight == 2
    assert events == ["dispatch"] * 3 + ["wait", "dispatch"] * 2 + ["wait"] * 3


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_host_time_is_the_time_of_dispatching_alone(tiny, monkeypatch, name):
    run = tiny.new_engine(name, ONE_EACH[3] if name == "pipeline" else (), tiny.spec())
    state = tiny.place(run, tiny.init(run.spec))
    now, block = [0.0], jax.block_until_ready
    monkeypatch.setattr(synchronous.time, "perf_counter", lambda: now[0])

    def wait(tree):
        now[0] += 100.0
        return block(tree)

    def slow(program):
        def call(*arguments):
            now[0] += 2.0
            return program(*arguments)

        return call

    monkeypatch.setattr(jax, "block_until_ready", wait)
    programs = run.programs if name == "pipeline" else run.steps
    monkeypatch.setattr(type(programs), "__missing__", watched(type(programs).__missing__, slow))
    for report in run.run(state, tiny.source, STEPS):
        report.snapshot = None
    assert now[0] > 100.0
    assert run.host_seconds == 2.0 * STEPS * (3 if name == "pipeline" else 1)


def watched(missing, wrap):
    """Returns a replacement of `Programs.__missing__` whose programs are wrapped."""

    def make(self, turn):
        program = self[turn] = wrap(missing(self, turn))
        return program

    return make
