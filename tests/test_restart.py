"""Tests of snapshots during training, and of modules that fail before, in and after updates."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1
from runs import records
from test_threads import TOTAL, Fault, begin, new_engine, run, workers
from test_threads_runs import threaded

from dgl_jax.engines import EngineState, ThreadsEngine, counts, threads
from dgl_jax.engines.asynchronous import flight_of
from dgl_jax.errors import UserError
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.saver import Saver
from dgl_jax.train import train_and_evaluate


class Lost(Fault):
    """Fails after the program has donated its state.

    Attributes:
      happened: event set when the fault has occurred.
    """

    def __init__(self, engine: ThreadsEngine, k: int, call: int):
        self.happened = threading.Event()
        program, calls = engine.programs[k], [0]

        def faulty(*args):
            calls[0] += 1
            result = program(*args)
            if calls[0] == call:
                assert all(x.is_deleted() for x in jax.tree.leaves(args[0].params))
                self.happened.set()
                raise RuntimeError("injected")
            return result

        engine.programs[k] = faulty


def recovering(tiny, engine: ThreadsEngine) -> list[int]:
    """Lets failed modules restart from their first state; returns the list of their indices."""
    asked: list[int] = []
    engine.recover = lambda k: asked.append(k) or begin(tiny, engine).modules[k]
    return asked


def test_snapshot_waits_for_the_restart_of_a_failed_module(tiny, devices, to_host):
    engine = new_engine(tiny, devices)
    fault, asked, copies, seen = Lost(engine, 1, call=5), recovering(tiny, engine), [], []
    for report in engine.run(begin(tiny, engine), tiny.source, TOTAL):
        seen.append(report)
        if not copies and report.updates[1] == 2:
            assert fault.happened.wait(120)  # the event of the failure is still in the queue
            copies.append(report.snapshot())
            assert asked == [1]
    assert np.isfinite(to_host(copies[0].modules[1]).params["objective"]["Dense_0"]["kernel"]).all()
    assert counts(report.snapshot()) == [TOTAL] * 3
    # Reports sent before the failure was handled are kept, and come first.
    assert [r.updates[1] for r in seen if r.metrics[1]] == [1, 2, 3, 4, *range(1, TOTAL + 1)]
    assert workers() == []


def test_snapshot_raises_if_a_failed_module_is_not_restarted(tiny, devices):
    engine = new_engine(tiny, devices)
    fault, reports = Lost(engine, 1, call=3), engine.run(begin(tiny, engine), tiny.source, 10**6)
    report = next(reports)
    assert fault.happened.wait(120)
    with pytest.raises(UserError, match=r"module_1 failed after 2 updates: RuntimeError: injected"):
        report.snapshot()
    reports.close()
    assert workers() == []


def failing_after(engine: ThreadsEngine, k: int, *updates: int) -> None:
    """Makes module k fail after given numbers of updates.

    Args:
      engine: engine to change.
      k: index of the module.
      *updates: number of updates before each failure, counted from the previous restart.
    """
    program, left, since = engine.programs[k], list(updates), [0]

    def faulty(*args):
        if left and since[0] == left[0]:
            left.pop(0)
            since[0] = 0
            raise RuntimeError("injected")
        since[0] += 1
        return program(*args)

    engine.programs[k] = faulty


def test_failures_at_different_updates_are_not_in_a_row(tiny, devices):
    engine = new_engine(tiny, devices)
    failing_after(engine, 2, 6, 3, 5, 2, 4)
    asked = recovering(tiny, engine)
    state, _ = run(tiny, engine)
    assert asked == [2] * 5
    assert counts(state) == [TOTAL] * 3


@pytest.mark.parametrize(("updates", "restarts"), [((6, 3, 3, 3, 3), 4), ((4, 0, 0, 0), 3)])
def test_failures_at_the_same_update_are_in_a_row(tiny, devices, updates, restarts):
    engine = new_engine(tiny, devices)
    failing_after(engine, 2, *updates)
    asked = recovering(tiny, engine)
    with pytest.raises(
        UserError, match=rf"module_2 failed 4 times in a row after {updates[-1]} updates"
    ):
        run(tiny, engine)
    assert asked == [2] * restarts


def flat(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_snapshot_keeps_the_rings_of_its_time(tiny, devices):
    engine, taken = new_engine(tiny, devices), []
    state = begin(tiny, engine)
    live = flight_of(state)
    for report in engine.run(state, tiny.source, TOTAL):
        snapshot = report.snapshot()
        if counts(snapshot)[0] < TOTAL:  # a finished module reads batches without updates
            assert snapshot.flight.snapshot()["counts"][1] == counts(snapshot)[0]
        for k in (1, 2):
            written = snapshot.flight.snapshot()[f"ring_{k}"]["headers"][:, 1].max()
            assert written <= counts(snapshot)[k - 1], "a message is newer than its producer"
        taken.append((snapshot, flat(snapshot.flight.snapshot())))
        assert report.snapshot(flight=False).flight is None
    first, before = taken[0]
    assert same(first.flight.snapshot(), before)
    assert not same(first.flight.snapshot(), live.snapshot())
    # A state resumed from the snapshot has the same rings.
    again = engine.resume(EngineState(first.modules), first.flight.snapshot())
    assert same(flight_of(again).snapshot(), before)
    assert {name for name in engine.gauges(first) if name.startswith("replay/")} == set(
        flight_of(again).gauges()
    )


def test_one_module_is_restored_from_a_damaged_checkpoint(tiny, devices, tmp_path, to_host):
    engine = new_engine(tiny, devices)
    state, _ = run(tiny, engine, until=2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state, {}, flight=state.flight.snapshot())
    checkpoints.finish()
    for other in ("module_0", "module_2", "flight"):
        for file in (tmp_path / "checkpoints" / "2" / other).rglob("d/*"):
            file.write_bytes(b"")

    def prepare(_):
        return engine.spec.abstract_states(), engine.placement

    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(prepare)
    restored = checkpoints.restore_module(1, prepare)
    assert same(to_host(restored), to_host(state.modules[1]))
    assert {device for leaf in jax.tree.leaves(restored) for device in leaf.devices()} == {
        devices[1]
    }
    checkpoints.close()


@pytest.mark.medium
def test_recovery_reads_one_module_only(tiny, devices, tmp_path, to_host, monkeypatch):
    engine, read = new_engine(tiny, devices), []
    checkpoints, begun = (
        Checkpoints(tmp_path / "checkpoints"),
        SimpleNamespace(step=0, flight=False),
    )
    saver = Saver(SimpleNamespace(spec=engine.spec, engine=engine), checkpoints, None, begun)
    assert saver.recover(1) is None
    state, _ = run(tiny, engine, until=2)
    checkpoints.save(2, state, {}, flight=state.flight.snapshot())
    load = v1.load_checkpointables
    monkeypatch.setattr(
        v1,
        "load_checkpointables",
        lambda path, wanted: read.append(set(wanted)) or load(path, wanted),
    )
    assert same(to_host(saver.recover(1)), to_host(state.modules[1]))
    assert read == [{"module_1"}]
    # Twin: restoring the whole state reads all of them.
    checkpoints.restore(lambda _: (engine.spec.abstract_states(), engine.placement))
    assert read[1:] == [{"module_0", "module_1", "module_2", "flight"}]
    checkpoints.close()


@pytest.mark.slow
def test_run_never_saves_a_module_without_its_state(tmp_path, monkeypatch):
    """Lets module 1 fail when the checkpoint of step 12 is due.

    The failure is handled only when the copy for that checkpoint is made.
    """
    init, snapshot, save = ThreadsEngine.__init__, threads.Supervisor.snapshot, Checkpoints.save
    faults, restored, saved = [], [], {}

    def faulty(self, *args):
        init(self, *args)
        faults.append(Lost(self, 1, call=14))

    def late(self, **options):
        if self.workers[1].updates >= 12 and not restored:
            assert faults[0].happened.wait(120)
        return snapshot(self, **options)

    def keep(self, step, state, *rest):
        saved[step] = min(counts(state))
        save(self, step, state, *rest)

    def counted_restore(self, k, prepare):
        restored.append(k)
        return restore_module(self, k, prepare)

    restore_module = Checkpoints.restore_module
    monkeypatch.setattr(Checkpoints, "restore_module", counted_restore)
    monkeypatch.setattr(Checkpoints, "save", keep)
    monkeypatch.setattr(ThreadsEngine, "__init__", faulty)
    monkeypatch.setattr(threads.Supervisor, "snapshot", late)
    summary = train_and_evaluate(
        threaded(engine__restart_workers=True, engine__slowdown=(1.0, 20.0)), tmp_path
    )
    assert restored == [1]
    assert [m["updates"] for m in summary.modules] == [24, 24]
    assert all(least >= step for step, least in saved.items())
    assert max(saved) == 24
    assert records(tmp_path)[-1]["step"] == 24


class Copies:
    """Records the publications of module 1 and the copies that module 0 holds, by version.

    Attributes:
      sent: kernels of the publications by version; a restarted module sends some versions again.
      held: version and kernel of the copy after each update, in order.
    """

    def __init__(self, engine: ThreadsEngine):
        self.sent: dict[int, list[np.ndarray]] = {}
        self.held: list[tuple[int, np.ndarray]] = []
        reader, publisher = engine.programs
        several = threading.Event()

        def kernel(published):
            (kernel,) = (x for x in jax.tree.leaves(published["next_block"]) if x.ndim == 4)
            return int(published["version"]), np.array(kernel)

        def publish(*args):
            state, outbox, metrics = publisher(*args)
            version, sent = kernel(outbox.below.published)
            self.sent.setdefault(version, []).append(sent)
            if len(self.sent) == 5:
                several.set()
            return state, outbox, metrics

        def read(*args):
            if len(self.held) == 10:  # not all updates before there are copies
                assert several.wait(120)
            state, outbox, metrics = reader(*args)
            self.held.append(kernel(state.extras["published"]))
            return state, outbox, metrics

        engine.programs[:] = [read, publish]

    def mixed_up(self) -> int:
        """Counts the copies that differ from all publications of the version that they carry."""
        return sum(
            not any(np.array_equal(held, sent) for sent in self.sent.get(version, []))
            for version, held in self.held
            if version
        )


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_restarts_keep_the_version_of_a_momentum_copy(failing, tmp_path, monkeypatch, caplog):
    init, save = ThreadsEngine.__init__, Checkpoints.save
    watched, saved = [], threading.Event()

    def faulty(self, *args):
        init(self, *args)
        watched.append(Copies(self))
        Fault(self, failing, call=14)
        failing_program = self.programs[failing]

        def held(*args):
            if len(watched[0].held if failing == 0 else watched[0].sent) == 13:
                assert saved.wait(120)
            return failing_program(*args)

        self.programs[failing] = held

    def noted(self, *args):
        save(self, *args)
        saved.set()

    monkeypatch.setattr(ThreadsEngine, "__init__", faulty)
    monkeypatch.setattr(Checkpoints, "save", noted)
    config = threaded(
        engine__restart_workers=True,
        engine__slowdown=(1.0, 1.0),
        objective__name="auglocal",
        objective__momentum_block=True,
        objective__momentum=0.0,
    )
    summary = train_and_evaluate(config, tmp_path)
    assert f"module_{failing} resumes from its newest checkpoint" in caplog.text
    assert [m["updates"] for m in summary.modules] == [24, 24]
    (copies,) = watched
    versions = [version for version, _ in copies.held]
    assert max(versions) > 4
    assert copies.mixed_up() == 0
    # Only a restarted reader gets an older copy; publications that are older than it are not read.
    steps = np.diff(versions)
    assert (steps < 0).sum() <= (failing == 0)
    # Twin: copies that carry another version are found.
    copies.held = [(version + 1, kernel) for version, kernel in copies.held]
    assert copies.mixed_up() > 0
