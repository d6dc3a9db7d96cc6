"""Snapshots while workers go on, and modules that fail between, in and after their updates."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1
from runs import records
from test_threads import TOTAL, Fault, begin, engine, run, threaded, workers

from dgl_jax.engines import EngineState, ThreadsEngine, counts, threads
from dgl_jax.engines.asynchronous import flight_of
from dgl_jax.errors import UserError
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.saver import Saver
from dgl_jax.train import train_and_evaluate


class Lost(Fault):
    """A fault that comes when the step has taken over (donated) its state; `happened` says that it has."""

    def __init__(self, made: ThreadsEngine, k: int, call: int):
        self.happened = threading.Event()
        program, calls = made.programs[k], [0]

        def faulty(*args):
            calls[0] += 1
            result = program(*args)
            if calls[0] == call:
                assert all(x.is_deleted() for x in jax.tree.leaves(args[0].params))
                self.happened.set()
                raise RuntimeError("injected")
            return result

        made.programs[k] = faulty


def recovering(tiny, made: ThreadsEngine) -> list[int]:
    """Restarts a module from its first state; gives the modules that asked for it."""
    asked: list[int] = []
    made.recover = lambda k: asked.append(k) or begin(tiny, made).modules[k]
    return asked


def test_a_snapshot_waits_for_the_restart_of_a_module_that_lost_its_state(tiny, devices, to_host):
    made = engine(tiny, devices)
    fault, asked, copies, seen = Lost(made, 1, call=5), recovering(tiny, made), [], []
    for report in made.run(begin(tiny, made), tiny.source, TOTAL):
        seen.append(report)
        if not copies and report.updates[1] == 2:
            assert fault.happened.wait(120)  # nobody has heard of the failure yet
            copies.append(report.snapshot())
            assert asked == [1]
    assert np.isfinite(to_host(copies[0].modules[1]).params["objective"]["Dense_0"]["kernel"]).all()
    assert counts(report.snapshot()) == [TOTAL] * 3
    # What was said before the failure was heard is not lost, and comes first.
    assert [r.updates[1] for r in seen if r.metrics[1]] == [1, 2, 3, 4, *range(1, TOTAL + 1)]
    assert workers() == []


def test_a_snapshot_of_a_module_that_is_not_to_be_restarted_names_it(tiny, devices):
    made = engine(tiny, devices)
    fault, reports = Lost(made, 1, call=3), made.run(begin(tiny, made), tiny.source, 10**6)
    report = next(reports)
    assert fault.happened.wait(120)
    with pytest.raises(UserError, match=r"module_1 failed after 2 updates: RuntimeError: injected"):
        report.snapshot()
    reports.close()
    assert workers() == []


def failing_after(made: ThreadsEngine, k: int, *updates: int) -> None:
    """Module k fails once it has made so many updates since it was last restarted: the first number first, and so on."""
    program, left, since = made.programs[k], list(updates), [0]

    def faulty(*args):
        if left and since[0] == left[0]:
            left.pop(0)
            since[0] = 0
            raise RuntimeError("injected")
        since[0] += 1
        return program(*args)

    made.programs[k] = faulty


def test_failures_with_other_updates_between_them_are_not_in_a_row(tiny, devices):
    made = engine(tiny, devices)
    failing_after(made, 2, 6, 3, 5, 2, 4)
    asked = recovering(tiny, made)
    state, _ = run(tiny, made)
    assert asked == [2] * 5
    assert counts(state) == [TOTAL] * 3


@pytest.mark.parametrize(("updates", "restarts"), [((6, 3, 3, 3, 3), 4), ((4, 0, 0, 0), 3)])
def test_failures_of_the_same_update_are(tiny, devices, updates, restarts):
    made = engine(tiny, devices)
    failing_after(made, 2, *updates)
    asked = recovering(tiny, made)
    with pytest.raises(
        UserError, match=rf"module_2 failed 4 times in a row after {updates[-1]} updates"
    ):
        run(tiny, made)
    assert asked == [2] * restarts


def flat(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_a_snapshot_holds_the_rings_as_they_were(tiny, devices):
    made, taken = engine(tiny, devices), []
    state = begin(tiny, made)
    live = flight_of(state)
    for report in made.run(state, tiny.source, TOTAL):
        snapshot = report.snapshot()
        if (
            counts(snapshot)[0] < TOTAL
        ):  # afterwards the first module reads batches that it only hands on
            assert snapshot.flight.snapshot()["counts"][1] == counts(snapshot)[0]
        for k in (1, 2):
            written = snapshot.flight.snapshot()[f"ring_{k}"]["headers"][:, 1].max()
            assert written <= counts(snapshot)[k - 1], "a packet is newer than its producer"
        taken.append((snapshot, flat(snapshot.flight.snapshot())))
        assert report.snapshot(flight=False).flight is None
    first, before = taken[0]
    assert same(first.flight.snapshot(), before)
    assert not same(first.flight.snapshot(), live.snapshot())
    # Whoever goes on from it goes on from what it was.
    again = made.resume(EngineState(first.modules), first.flight.snapshot())
    assert same(flight_of(again).snapshot(), before)
    assert {name for name in made.gauges(first) if name.startswith("replay/")} == set(
        flight_of(again).gauges()
    )


def test_one_module_comes_back_from_a_checkpoint_whatever_became_of_the_others(
    tiny, devices, tmp_path, to_host
):
    made = engine(tiny, devices)
    state, _ = run(tiny, made, until=2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state, {}, flight=state.flight.snapshot())
    checkpoints.finish()
    for other in ("module_0", "module_2", "flight"):
        for file in (tmp_path / "checkpoints" / "2" / other).rglob("d/*"):
            file.write_bytes(b"")

    def prepare(_):
        return made.spec.abstract_states(), made.placement

    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(prepare)
    found = checkpoints.restore_module(1, prepare)
    assert same(to_host(found), to_host(state.modules[1]))
    assert {device for leaf in jax.tree.leaves(found) for device in leaf.devices()} == {devices[1]}
    checkpoints.close()


def test_a_recovery_reads_the_arrays_of_one_module(tiny, devices, tmp_path, to_host, monkeypatch):
    made, read = engine(tiny, devices), []
    checkpoints, begun = (
        Checkpoints(tmp_path / "checkpoints"),
        SimpleNamespace(step=0, flight=False),
    )
    saver = Saver(SimpleNamespace(spec=made.spec, engine=made), checkpoints, None, begun)
    assert saver.recover(1) is None
    state, _ = run(tiny, made, until=2)
    checkpoints.save(2, state, {}, flight=state.flight.snapshot())
    load = v1.load_checkpointables
    monkeypatch.setattr(
        v1,
        "load_checkpointables",
        lambda path, wanted: read.append(set(wanted)) or load(path, wanted),
    )
    assert same(to_host(saver.recover(1)), to_host(state.modules[1]))
    assert read == [{"module_1"}]
    # Twin: a whole restoring reads all of them.
    checkpoints.restore(lambda _: (made.spec.abstract_states(), made.placement))
    assert read[1:] == [{"module_0", "module_1", "module_2", "flight"}]
    checkpoints.close()


@pytest.mark.slow
def test_a_whole_run_never_saves_a_module_that_lost_its_state(tmp_path, monkeypatch):
    """The failure happens when a checkpoint is due at step 12, and is heard only when the copy for it is made."""
    made, snapshot, save = ThreadsEngine.__init__, threads.Supervisor.snapshot, Checkpoints.save
    faults, restored, saved = [], [], {}

    def faulty(self, *args):
        made(self, *args)
        faults.append(Lost(self, 1, call=14))

    def late(self, **options):
        if self.workers[1].updates >= 12 and not restored:
            assert faults[0].happened.wait(120)
        return snapshot(self, **options)

    def keep(self, step, state, *rest):
        saved[step] = min(counts(state))
        save(self, step, state, *rest)

    def of_one(self, k, prepare):
        restored.append(k)
        return restore_module(self, k, prepare)

    restore_module = Checkpoints.restore_module
    monkeypatch.setattr(Checkpoints, "restore_module", of_one)
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
