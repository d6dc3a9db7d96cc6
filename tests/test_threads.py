"""Asynchronous training in threads: what a worker may and may not do to the others, failures, the end, resuming."""

import json
import logging
import os
import re
import signal
import threading

import jax
import numpy as np
import pytest
from runs import arrays, records, small_config, watch_labels
from test_resume import interrupted

from dgl_jax.config import ReplaySettings
from dgl_jax.engines import EngineState, ThreadsEngine, ThreadsOptions, counts, threads
from dgl_jax.engines.asynchronous import flight_of
from dgl_jax.engines.placement import assign
from dgl_jax.errors import UserError
from dgl_jax.replay import Ring
from dgl_jax.run import signals
from dgl_jax.train import train_and_evaluate

TOTAL = 12


def engine(tiny, devices, replay=None, **settings) -> ThreadsEngine:
    """Three modules on three devices."""
    return ThreadsEngine(
        tiny.spec(), assign(devices[:3], 3), ThreadsOptions(**settings), replay or ReplaySettings(3)
    )


def begin(tiny, made: ThreadsEngine) -> EngineState:
    """A fresh state with empty rings."""
    return made.resume(tiny.place(made, tiny.init(made.spec)), None)


def run(tiny, made: ThreadsEngine, until: int = TOTAL) -> tuple[EngineState, list]:
    """State at the end and all reports."""
    reports = list(made.run(begin(tiny, made), tiny.source, until))
    return reports[-1].snapshot(), reports


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("module_")]


class Gate:
    """Holds a module's program back until it is opened; `entered` says that the worker has come to it."""

    def __init__(self, made: ThreadsEngine, k: int, after: int = 0):
        self.opened, self.entered, self.calls = threading.Event(), threading.Event(), 0
        program = made.programs[k]

        def held(*args):
            self.calls += 1
            if self.calls > after:
                self.entered.set()
                assert self.opened.wait(120)
            return program(*args)

        made.programs[k] = held


class Fault:
    """Makes a module's program fail at its n-th call, and `times` times in all."""

    def __init__(self, made: ThreadsEngine, k: int, call: int, times: int = 1):
        self.calls, program = 0, made.programs[k]

        def faulty(*args):
            self.calls += 1
            if call <= self.calls < call + times:
                raise RuntimeError("injected")
            return program(*args)

        made.programs[k] = faulty


def test_every_module_ends_with_the_same_number_of_updates(tiny, devices):
    state, reports = run(tiny, engine(tiny, devices, slowdown=(1.0, 2.0, 1.0)))
    assert counts(state) == [TOTAL] * 3
    assert len(reports) == 3 * TOTAL
    for before, report in zip([(0, 0, 0), *[r.updates for r in reports]], reports):
        assert [b - a for a, b in zip(before, report.updates)] == [
            int(bool(m)) for m in report.metrics
        ]
    assert all(np.isfinite(m["loss"]).all() for r in reports for m in r.metrics if m)
    assert workers() == []


def test_a_module_that_stands_still_holds_nobody_up(tiny, devices):
    made = engine(tiny, devices)
    gate = Gate(made, 1, after=2)
    seen = []
    for report in made.run(begin(tiny, made), tiny.source, TOTAL):
        seen.append(report.updates)
        if report.updates[0] == report.updates[2] == TOTAL and not gate.opened.is_set():
            assert (
                report.updates[1] == 2
            )  # both neighbours have finished: one with its input lost, one on the same two packets
            gate.opened.set()
    assert gate.opened.is_set()
    assert seen[-1] == (TOTAL,) * 3


def test_twin_waiting_for_the_slow_module_would_be_noticed(tiny, devices):
    made = engine(tiny, devices, replay=ReplaySettings(3, max_reuse=1), watchdog_seconds=0.0)
    gate = Gate(made, 1, after=2)
    for report in made.run(begin(tiny, made), tiny.source, TOTAL):
        if report.updates[0] == TOTAL and not gate.opened.is_set():
            assert (
                report.updates[2] <= 2
            )  # every packet once: nothing more to read until module_1 goes on
            gate.opened.set()
    assert gate.opened.is_set()


def test_a_snapshot_is_a_copy_and_stops_nobody(tiny, devices, to_host):
    made, copies = engine(tiny, devices), []
    for report in made.run(begin(tiny, made), tiny.source, TOTAL):
        if len(copies) < 2:
            copies.append(report.snapshot())
            before = to_host(copies[0].modules)
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(to_host(copies[0].modules)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert counts(report.snapshot()) == [TOTAL] * 3


def test_twin_a_snapshot_without_the_copy_is_lost(tiny, devices):
    made = engine(tiny, devices)
    made.copy = lambda state: state
    reports = made.run(begin(tiny, made), tiny.source, TOTAL)
    first = next(reports).snapshot()
    for _ in reports:
        pass
    with pytest.raises(RuntimeError, match="deleted"):
        counts(first)


def labels_are_right(tiny, made: ThreadsEngine, monkeypatch) -> list[bool]:
    """For every packet that was read: whether ids and labels are those of the batch its header names."""
    with monkeypatch.context() as patch:
        right = watch_labels(patch, tiny.source)
        run(tiny, made)
    return right


def test_labels_stay_with_their_activations(tiny, devices, monkeypatch):
    right = labels_are_right(tiny, engine(tiny, devices), monkeypatch)
    assert len(right) >= 2 * TOTAL
    assert all(right)


def test_twin_labels_of_another_packet_are_noticed(tiny, devices, monkeypatch):
    add, last = Ring.add, {}

    def late(self, payload, context, *rest):
        add(self, payload, last.get(id(self), context), *rest)
        last[id(self)] = context

    monkeypatch.setattr(Ring, "add", late)
    assert not all(labels_are_right(tiny, engine(tiny, devices), monkeypatch))


def test_a_failure_names_the_module_and_stops_the_others(tiny, devices, caplog):
    made = engine(tiny, devices)
    Fault(made, 1, call=3)
    with pytest.raises(
        UserError,
        match=r"module_1 failed after 2 updates: RuntimeError: injected; the others have stopped",
    ):
        run(tiny, made)
    assert workers() == []
    assert "Traceback" in caplog.text
    assert "in faulty" in caplog.text


def test_a_failed_module_is_restarted_while_the_others_go_on(tiny, devices):
    made = engine(tiny, devices)
    Fault(made, 1, call=5)
    asked = []
    made.recover = lambda k: asked.append(k) or begin(tiny, made).modules[k]
    state, reports = run(tiny, made)
    assert asked == [1]
    assert counts(state) == [TOTAL] * 3
    assert [r.updates[1] for r in reports if r.metrics[1]] == [1, 2, 3, 4, *range(1, TOTAL + 1)]
    assert all(
        b >= a
        for k in (0, 2)
        for a, b in zip([r.updates[k] for r in reports], [r.updates[k] for r in reports][1:])
    )


def test_a_module_that_fails_again_and_again_ends_the_run(tiny, devices):
    made = engine(tiny, devices)
    Fault(made, 2, call=2, times=100)
    asked = []
    made.recover = lambda k: asked.append(k) or begin(tiny, made).modules[k]
    with pytest.raises(UserError, match=r"module_2 failed 4 times in a row after 0 updates"):
        run(tiny, made)
    assert len(asked) == 3
    assert workers() == []


def test_closing_the_reports_stops_the_workers(tiny, devices):
    made = engine(tiny, devices)
    reports = made.run(begin(tiny, made), tiny.source, 10**6)
    next(reports)
    reports.close()
    assert workers() == []


def test_stop_ends_after_the_current_step_and_keeps_every_update(tiny, devices):
    made, told = engine(tiny, devices), []
    state = begin(tiny, made)
    for report in made.run(state, tiny.source, 10**6, stop=lambda: bool(told)):
        if min(report.updates) >= 3:
            told.append(True)
    assert counts(report.snapshot()) == list(report.updates)
    assert workers() == []


def test_the_watchdog_names_who_stands_still(tiny, devices):
    made = engine(tiny, devices, watchdog_seconds=50.0)
    gate = Gate(made, 1)
    told: list[str] = []
    made.clock = lambda: 60.0 if gate.entered.is_set() else 0.0

    class Listener(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())
            if "module_1" in told[-1]:
                gate.opened.set()

    listener, log = Listener(logging.WARNING), logging.getLogger("dgl_jax.engines.threads")
    log.addHandler(listener)
    try:
        for _ in made.run(begin(tiny, made), tiny.source, 3):
            pass
    finally:
        log.removeHandler(listener)
    assert "module_1 has made no progress for 60 s: working on update 1" in told


def test_what_crossed_is_counted(tiny, devices):
    made = engine(tiny, devices)
    assert not made.traffic().measured
    run(tiny, made)
    traffic = made.traffic()
    assert traffic.measured
    assert traffic.wire == traffic.raw == made.spec.traffic().raw


def test_a_slowed_module_waits_in_proportion_to_its_own_step(tiny, devices, monkeypatch):
    made = engine(tiny, devices, slowdown=(1.0, 3.0, 1.0))
    waits: dict[str, list[float]] = {}
    wait = threading.Event.wait

    def spy(self, timeout=None):
        if timeout is not None and (name := threading.current_thread().name).startswith("module_"):
            waits.setdefault(name, []).append(timeout)
            timeout = 0.0
        return wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", spy)
    ticks = {f"module_{k}": iter(range(10**6)) for k in range(3)}
    # A clock of each worker's own, one second a look: a step is measured over one look.
    made.clock = lambda: float(next(ticks.get(threading.current_thread().name, iter([0]))))
    run(tiny, made)
    assert set(waits) == {"module_1"}
    assert set(waits["module_1"]) == {2.0}  # (3 - 1) times a step of one second
    assert len(waits["module_1"]) >= TOTAL - 1  # all but the first, which compiles


def test_gauges(tiny, devices):
    made = engine(tiny, devices)
    state = begin(tiny, made)
    made.gauges(state)
    reports = list(made.run(state, tiny.source, TOTAL))
    gauges = made.gauges(reports[-1].snapshot())
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


def jitter(made: ThreadsEngine, seed: int) -> None:
    """Every step is followed by a delay of up to 4 ms, now and then of 20."""
    never_set = threading.Event()
    for k, program in enumerate(made.programs):
        random = np.random.default_rng([seed, k])

        def delayed(*args, program=program, random=random):
            result = program(*args)
            never_set.wait(0.02 if random.random() < 0.02 else 0.004 * random.random())
            return result

        made.programs[k] = delayed


def test_soak_with_random_delays_and_a_failure(tiny, devices, monkeypatch):
    until, right = 400, watch_labels(monkeypatch, tiny.source)
    made = engine(tiny, devices)
    jitter(made, seed=0)
    Fault(made, 1, call=until // 2)
    saved = begin(tiny, made).modules
    made.recover = lambda k: saved[k]
    seen: list[tuple[int, int, int]] = []  # at intervals: workers, arrays alive, their bytes
    for report in made.run(begin(tiny, made), tiny.source, until):
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
    # A packet or two more or less may be under way whenever one looks; a leak would be hundreds.
    middle, end = seen[3], seen[-1]
    assert end[1] <= middle[1] + 100
    assert end[2] <= middle[2] + 20 * flight_of(begin(tiny, made)).ring(1).nbytes


# Whole runs


def threaded(**fields):
    """The last module is slow enough to be interrupted before the end."""
    fields = {"engine__slowdown": (1.0, 20.0), **fields}
    return small_config(engine__name="threads", **{"replay__size": 4, "train__steps": 24, **fields})


@pytest.mark.pictures
@pytest.mark.slow
def test_a_run_evaluates_and_saves_while_the_workers_go_on(tmp_path):
    summary = train_and_evaluate(threaded(), tmp_path)
    assert [m["updates"] for m in summary.modules] == [24, 24]
    assert summary.wire == "measured"
    assert len(summary.staleness) == len(summary.reuse) == 2
    found = records(tmp_path)
    steps = [r["step"] for r in found]
    assert steps == sorted(steps)
    assert [r["step"] for r in found if "learning_rate" in r] == list(range(3, 25, 3))
    assert found[-1]["step"] == 24
    assert "test/ensemble/accuracy" in found[-1]
    assert all(np.isfinite(a).all() for a in arrays(tmp_path) if a.dtype == np.float32)
    assert (tmp_path / "plots" / "timeline.png").exists()


@pytest.mark.slow
def test_a_resumed_run_restores_every_module_and_ends_at_the_same_totals(tmp_path, caplog):
    interrupted(tmp_path, 9, threaded())
    state = json.loads((tmp_path / "config.json").read_text())
    assert state["engine"]["name"] == "threads"
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    with caplog.at_level("INFO", logger="dgl_jax"):
        summary = train_and_evaluate(threaded(), tmp_path)
    assert f"resuming from step {newest}" in caplog.text
    assert [m["updates"] for m in summary.modules] == [24, 24]
    steps = [r["step"] for r in records(tmp_path) if "learning_rate" in r]
    assert steps == sorted(set(steps))
    assert steps[-1] == 24


@pytest.mark.slow
def test_without_rings_in_the_checkpoint_it_says_that_it_is_not_exact(tmp_path, caplog):
    config = threaded(checkpoint__replay_every=0)
    interrupted(tmp_path, 9, config)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert train_and_evaluate(config, tmp_path).steps == 24
    assert "the checkpoint holds no replay rings: they start empty" in caplog.text


@pytest.mark.slow
def test_a_whole_run_restarts_a_module_from_its_newest_checkpoint(tmp_path, monkeypatch, caplog):
    made = ThreadsEngine.__init__

    def faulty(self, *args):
        made(self, *args)
        Fault(self, 1, call=14)  # after the checkpoints of steps 4, 8 and 12

    monkeypatch.setattr(ThreadsEngine, "__init__", faulty)
    with pytest.raises(
        UserError,
        match=r"module_1 failed after 13 updates: RuntimeError: injected; .* last checkpoint is good",
    ):
        train_and_evaluate(threaded(), tmp_path / "stopped")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        summary = train_and_evaluate(threaded(engine__restart_workers=True), tmp_path / "restarted")
    assert [m["updates"] for m in summary.modules] == [24, 24]
    restarted = re.search(
        r"module_1 goes on from its newest checkpoint, with (\d+) updates", caplog.text
    )
    assert 4 <= int(restarted[1]) <= 13
    steps = [r["step"] for r in records(tmp_path / "restarted") if "learning_rate" in r]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("meanwhile", ["watching", "in a snapshot"])
def test_a_second_signal_quits_at_once(meanwhile, tmp_path, monkeypatch):
    """Module 1 stands still for good: the first signal waits for it, the second does not, whatever the main thread waits for."""
    made, gates = ThreadsEngine.__init__, []
    there, heard, calls = threading.Event(), threading.Event(), signals.Interruption.__call__
    method = "watch" if meanwhile == "watching" else "snapshot"
    original = getattr(threads.Supervisor, method)

    def held(self, *args):
        made(self, *args)
        gates.append(Gate(self, 1, after=4))

    def arrived(self, **options):
        """The main thread has come to what it does meanwhile, and module 1 to its gate."""
        if self.workers[1].updates == 4 and gates[0].entered.wait(60):
            there.set()
        return original(self, **options)

    def hear(self, *args):
        calls(self, *args)
        heard.set()

    def twice():
        for moment in (there, heard):
            if moment.wait(60):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ThreadsEngine, "__init__", held)
    monkeypatch.setattr(threads.Supervisor, method, arrived)
    monkeypatch.setattr(signals.Interruption, "__call__", hear)
    user = threading.Thread(target=twice)
    user.start()
    every = 4 if meanwhile == "in a snapshot" else 1000
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(threaded(checkpoint__every=every, eval__every=every), tmp_path)
    user.join()
    assert not gates[0].opened.is_set()
    assert "module_1" in workers(), "it was waited for"
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    gates[0].opened.set()  # lets the worker that was left behind end
    assert [m["updates"] for m in train_and_evaluate(threaded(), tmp_path).modules] == [24, 24]
