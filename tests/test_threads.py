"""Tests of the engine `threads`: independence of workers, snapshots, failures, stop, and gauges."""

import logging
import threading

import jax
import numpy as np
import pytest
from runs import watch_labels

from dgl_jax.config import ReplaySettings
from dgl_jax.engines import EngineState, ThreadsEngine, ThreadsOptions, counts
from dgl_jax.engines.asynchronous import flight_of
from dgl_jax.engines.placement import assign
from dgl_jax.errors import UserError
from dgl_jax.replay import Ring

TOTAL = 12


def new_engine(tiny, devices, replay=None, **settings) -> ThreadsEngine:
    """Creates an engine with three modules on three devices."""
    return ThreadsEngine(
        tiny.spec(), assign(devices[:3], 3), ThreadsOptions(**settings), replay or ReplaySettings(3)
    )


def begin(tiny, engine: ThreadsEngine) -> EngineState:
    """Returns a fresh state with empty rings."""
    return engine.resume(tiny.place(engine, tiny.init(engine.spec)), None)


def run(tiny, engine: ThreadsEngine, until: int = TOTAL) -> tuple[EngineState, list]:
    """Returns the final state and all reports."""
    reports = list(engine.run(begin(tiny, engine), tiny.source, until))
    return reports[-1].snapshot(), reports


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("module_")]


class Gate:
    """Blocks a module's program until `opened` is set.

    Attributes:
      opened: event that lets the program continue.
      entered: event set when the worker has reached the gate.
      calls: number of calls of the program.
    """

    def __init__(self, engine: ThreadsEngine, k: int, after: int = 0):
        self.opened, self.entered, self.calls = threading.Event(), threading.Event(), 0
        program = engine.programs[k]

        def held(*args):
            self.calls += 1
            if self.calls > after:
                self.entered.set()
                assert self.opened.wait(120)
            return program(*args)

        engine.programs[k] = held


class Fault:
    """Makes a module's program fail at its n-th call, `times` times in a row."""

    def __init__(self, engine: ThreadsEngine, k: int, call: int, times: int = 1):
        self.calls, program = 0, engine.programs[k]

        def faulty(*args):
            self.calls += 1
            if call <= self.calls < call + times:
                raise RuntimeError("injected")
            return program(*args)

        engine.programs[k] = faulty


@pytest.mark.medium
def test_every_module_ends_with_the_same_number_of_updates(tiny, devices):
    state, reports = run(tiny, new_engine(tiny, devices, slowdown=(1.0, 2.0, 1.0)))
    assert counts(state) == [TOTAL] * 3
    assert len(reports) == 3 * TOTAL
    for before, report in zip([(0, 0, 0), *[r.updates for r in reports]], reports):
        assert [b - a for a, b in zip(before, report.updates)] == [
            int(bool(m)) for m in report.metrics
        ]
    assert all(np.isfinite(m["loss"]).all() for r in reports for m in r.metrics if m)
    assert workers() == []


def test_stalled_module_does_not_block_the_others(tiny, devices):
    engine = new_engine(tiny, devices)
    gate = Gate(engine, 1, after=2)
    seen = []
    for report in engine.run(begin(tiny, engine), tiny.source, TOTAL):
        seen.append(report.updates)
        if report.updates[0] == report.updates[2] == TOTAL and not gate.opened.is_set():
            # Both neighbors have finished: messages of module 0 were overwritten unread, and module
            # 2 read the same two messages repeatedly.
            assert report.updates[1] == 2
            gate.opened.set()
    assert gate.opened.is_set()
    assert seen[-1] == (TOTAL,) * 3


def test_twin_reuse_limit_makes_the_next_module_wait(tiny, devices):
    engine = new_engine(tiny, devices, replay=ReplaySettings(3, max_reuse=1), watchdog_seconds=0.0)
    gate = Gate(engine, 1, after=2)
    for report in engine.run(begin(tiny, engine), tiny.source, TOTAL):
        if report.updates[0] == TOTAL and not gate.opened.is_set():
            # Each message may be read once, so module 2 has nothing more to read.
            assert report.updates[2] <= 2
            gate.opened.set()
    assert gate.opened.is_set()


def test_snapshot_is_a_copy_and_workers_continue(tiny, devices, to_host):
    engine, copies = new_engine(tiny, devices), []
    for report in engine.run(begin(tiny, engine), tiny.source, TOTAL):
        if len(copies) < 2:
            copies.append(report.snapshot())
            before = to_host(copies[0].modules)
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(to_host(copies[0].modules)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert counts(report.snapshot()) == [TOTAL] * 3


def test_twin_snapshot_without_copy_is_deleted(tiny, devices):
    engine = new_engine(tiny, devices)
    engine.copy = lambda state: state
    reports = engine.run(begin(tiny, engine), tiny.source, TOTAL)
    first = next(reports).snapshot()
    for _ in reports:
        pass
    with pytest.raises(RuntimeError, match="deleted"):
        counts(first)


def labels_are_right(tiny, engine: ThreadsEngine, monkeypatch) -> list[bool]:
    """Checks every message that is read from a ring.

    Returns:
      For each message, True if its ids and labels are those in the batch that its header names.
    """
    with monkeypatch.context() as patch:
        right = watch_labels(patch, tiny.source)
        run(tiny, engine)
    return right


def test_labels_match_their_activations(tiny, devices, monkeypatch):
    right = labels_are_right(tiny, new_engine(tiny, devices), monkeypatch)
    assert len(right) >= 2 * TOTAL
    assert all(right)


def test_twin_labels_of_another_message_are_detected(tiny, devices, monkeypatch):
    add, last = Ring.add, {}

    def late(self, payload, context, *rest):
        add(self, payload, last.get(id(self), context), *rest)
        last[id(self)] = context

    monkeypatch.setattr(Ring, "add", late)
    assert not all(labels_are_right(tiny, new_engine(tiny, devices), monkeypatch))


def test_failure_names_the_module_and_stops_the_others(tiny, devices, caplog):
    engine = new_engine(tiny, devices)
    Fault(engine, 1, call=3)
    with pytest.raises(
        UserError,
        match=r"module_1 failed after 2 updates: RuntimeError: injected; the other modules have",
    ):
        run(tiny, engine)
    assert workers() == []
    assert "Traceback" in caplog.text
    assert "in faulty" in caplog.text


def test_failed_module_is_restarted_while_the_others_continue(tiny, devices):
    engine = new_engine(tiny, devices)
    Fault(engine, 1, call=5)
    asked = []
    engine.recover = lambda k: asked.append(k) or begin(tiny, engine).modules[k]
    state, reports = run(tiny, engine)
    assert asked == [1]
    assert counts(state) == [TOTAL] * 3
    assert [r.updates[1] for r in reports if r.metrics[1]] == [1, 2, 3, 4, *range(1, TOTAL + 1)]
    assert all(
        b >= a
        for k in (0, 2)
        for a, b in zip([r.updates[k] for r in reports], [r.updates[k] for r in reports][1:])
    )


def test_repeated_failures_end_the_run(tiny, devices):
    engine = new_engine(tiny, devices)
    Fault(engine, 2, call=2, times=100)
    asked = []
    engine.recover = lambda k: asked.append(k) or begin(tiny, engine).modules[k]
    with pytest.raises(UserError, match=r"module_2 failed 4 times in a row after 0 updates"):
        run(tiny, engine)
    assert len(asked) == 3
    assert workers() == []


def test_closing_the_reports_stops_the_workers(tiny, devices):
    engine = new_engine(tiny, devices)
    reports = engine.run(begin(tiny, engine), tiny.source, 10**6)
    next(reports)
    reports.close()
    assert workers() == []


def test_stop_ends_after_the_current_step_and_keeps_every_update(tiny, devices):
    engine, stopped = new_engine(tiny, devices), []
    state = begin(tiny, engine)
    for report in engine.run(state, tiny.source, 10**6, stop=lambda: bool(stopped)):
        if min(report.updates) >= 3:
            stopped.append(True)
    assert counts(report.snapshot()) == list(report.updates)
    assert workers() == []


def test_watchdog_names_the_stalled_module(tiny, devices):
    engine = new_engine(tiny, devices, watchdog_seconds=50.0)
    gate = Gate(engine, 1)
    warnings: list[str] = []
    engine.clock = lambda: 60.0 if gate.entered.is_set() else 0.0

    class Listener(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())
            if "module_1" in warnings[-1]:
                gate.opened.set()

    listener, log = Listener(logging.WARNING), logging.getLogger("dgl_jax.engines.threads")
    log.addHandler(listener)
    try:
        for _ in engine.run(begin(tiny, engine), tiny.source, 3):
            pass
    finally:
        log.removeHandler(listener)
    assert "module_1 has made no progress for 60 s: working on update 1" in warnings


def test_traffic_is_measured(tiny, devices):
    engine = new_engine(tiny, devices)
    assert not engine.traffic().measured
    run(tiny, engine)
    traffic = engine.traffic()
    assert traffic.measured
    assert traffic.wire == traffic.raw == engine.spec.traffic().raw


def test_slowdown_waits_in_proportion_to_the_step(tiny, devices, monkeypatch):
    engine = new_engine(tiny, devices, slowdown=(1.0, 3.0, 1.0))
    waits: dict[str, list[float]] = {}
    wait = threading.Event.wait

    def spy(self, timeout=None):
        if timeout is not None and (name := threading.current_thread().name).startswith("module_"):
            waits.setdefault(name, []).append(timeout)
            timeout = 0.0
        return wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", spy)
    ticks = {f"module_{k}": iter(range(10**6)) for k in range(3)}
    # Each worker has its own clock, which advances by one second per call, so a step takes 1 s.
    engine.clock = lambda: float(next(ticks.get(threading.current_thread().name, iter([0]))))
    run(tiny, engine)
    assert set(waits) == {"module_1"}
    assert set(waits["module_1"]) == {2.0}  # (3 - 1) times a step of one second
    assert len(waits["module_1"]) >= TOTAL - 1


def test_gauges_cover_rings_and_workers(tiny, devices):
    engine = new_engine(tiny, devices)
    state = begin(tiny, engine)
    engine.gauges(state)
    reports = list(engine.run(state, tiny.source, TOTAL))
    gauges = engine.gauges(reports[-1].snapshot())
    for k in (1, 2):
        ages = [n for name, n in gauges.items() if name.startswith(f"replay/module_{k}/ages_from_")]
        assert sum(ages) >= TOTAL
        assert 0 <= gauges[f"replay/module_{k}/age"] <= gauges[f"replay/module_{k}/oldest"] <= 2
        assert gauges[f"replay/module_{k}/bytes"] == flight_of(state).ring(k).nbytes
    assert all(gauges[f"work/module_{k}/updates_per_second"] > 0 for k in range(3))
    assert all(gauges[f"work/module_{k}/wait_seconds"] >= 0 for k in range(3))
    turns = flight_of(state).recent()
    assert {k for k, _, _ in turns} == {0, 1, 2}
    assert all(0 <= a <= b for _, a, b in turns)


def jitter(engine: ThreadsEngine, seed: int) -> None:
    """Delays every step by up to 4 ms, and one in 50 by 20 ms."""
    never_set = threading.Event()
    for k, program in enumerate(engine.programs):
        random = np.random.default_rng([seed, k])

        def delayed(*args, program=program, random=random):
            result = program(*args)
            never_set.wait(0.02 if random.random() < 0.02 else 0.004 * random.random())
            return result

        engine.programs[k] = delayed


@pytest.mark.medium
def test_long_run_with_random_delays_and_a_failure(tiny, devices, monkeypatch):
    until, right = 400, watch_labels(monkeypatch, tiny.source)
    engine = new_engine(tiny, devices)
    jitter(engine, seed=0)
    Fault(engine, 1, call=until // 2)
    saved = begin(tiny, engine).modules
    engine.recover = lambda k: saved[k]
    seen: list[tuple[int, int, int]] = []  # samples of (workers, live arrays, their bytes)
    for report in engine.run(begin(tiny, engine), tiny.source, until):
        assert report.step == min(report.updates)
        if report.metrics[2] and report.updates[2] % 40 == 0:
            alive = jax.live_arrays()
            seen.append((len(workers()), len(alive), sum(a.nbytes for a in alive)))
            del alive
    assert report.updates == (until,) * 3
    assert len(right) >= 2 * until
    assert all(right)
    assert len(seen) == 10
    assert max(n for n, _, _ in seen) <= 3
    assert workers() == []
    # The number of messages in flight varies by one or two; a leak would be hundreds of arrays.
    middle, end = seen[3], seen[-1]
    assert end[1] <= middle[1] + 100
    assert end[2] <= middle[2] + 20 * flight_of(begin(tiny, engine)).ring(1).nbytes
