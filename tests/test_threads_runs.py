"""Tests of whole runs with the engine `threads`: checkpoints, resume, restarts, and signals."""

import json
import os
import re
import signal
import threading

import numpy as np
import pytest
from runs import arrays, records, small_config
from test_resume import interrupted
from test_threads import Fault, Gate, workers

from dgl_jax.engines import ThreadsEngine, threads
from dgl_jax.errors import UserError
from dgl_jax.run import signals
from dgl_jax.train import train_and_evaluate


def threaded(**fields):
    """Returns a configuration whose last module is slow enough for an interruption."""
    fields = {"engine__slowdown": (1.0, 20.0), **fields}
    return small_config(engine__name="threads", **{"replay__size": 4, "train__steps": 24, **fields})


@pytest.mark.pictures
@pytest.mark.slow
def test_run_evaluates_and_saves_while_workers_continue(tmp_path):
    summary = train_and_evaluate(threaded(), tmp_path)
    assert [m["updates"] for m in summary.modules] == [24, 24]
    assert summary.wire == "measured"
    assert len(summary.staleness) == len(summary.reuse) == 2
    lines = records(tmp_path)
    steps = [r["step"] for r in lines]
    assert steps == sorted(steps)
    assert [r["step"] for r in lines if "learning_rate" in r] == list(range(3, 25, 3))
    assert lines[-1]["step"] == 24
    assert "test/ensemble/accuracy" in lines[-1]
    assert all(np.isfinite(a).all() for a in arrays(tmp_path) if a.dtype == np.float32)
    assert (tmp_path / "plots" / "timeline.png").exists()


@pytest.mark.slow
def test_resume_restores_every_module_and_reaches_the_same_totals(tmp_path, caplog):
    interrupted(tmp_path, 9, threaded())
    state = json.loads((tmp_path / "config.json").read_text())
    assert state["engine"]["name"] == "threads"
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    with caplog.at_level("INFO", logger="dgl_jax"):
        summary = train_and_evaluate(threaded(), tmp_path)
    assert f"from step {newest}" in caplog.text
    assert [m["updates"] for m in summary.modules] == [24, 24]
    steps = [r["step"] for r in records(tmp_path) if "learning_rate" in r]
    assert steps == sorted(set(steps))
    assert steps[-1] == 24


@pytest.mark.slow
def test_resume_without_rings_warns(tmp_path, caplog):
    config = threaded(checkpoint__replay_every=0)
    interrupted(tmp_path, 9, config)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert train_and_evaluate(config, tmp_path).steps == 24
    assert "the checkpoint holds no replay rings" in caplog.text


@pytest.mark.slow
def test_run_restarts_a_module_from_its_newest_checkpoint(tmp_path, monkeypatch, caplog):
    init = ThreadsEngine.__init__

    def faulty(self, *args):
        init(self, *args)
        Fault(self, 1, call=14)  # after the checkpoints of steps 4, 8 and 12

    monkeypatch.setattr(ThreadsEngine, "__init__", faulty)
    with pytest.raises(
        UserError,
        match=r"module_1 failed after 13 updates: RuntimeError: .* checkpoint of step \d+ is good$",
    ):
        train_and_evaluate(threaded(), tmp_path / "stopped")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        summary = train_and_evaluate(threaded(engine__restart_workers=True), tmp_path / "restarted")
    assert [m["updates"] for m in summary.modules] == [24, 24]
    restarted = re.search(
        r"module_1 resumes from its newest checkpoint with (\d+) updates", caplog.text
    )
    assert 4 <= int(restarted[1]) <= 13
    steps = [r["step"] for r in records(tmp_path / "restarted") if "learning_rate" in r]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("meanwhile", ["watching", "in a snapshot"])
def test_second_signal_quits_at_once(meanwhile, tmp_path, monkeypatch):
    """Stalls module 1 for good and sends two signals.

    The first signal waits for the module, the second does not, whatever the main thread waits for.
    """
    init, gates = ThreadsEngine.__init__, []
    reached, heard, interrupt = threading.Event(), threading.Event(), signals.Interruption.__call__
    method = "watch" if meanwhile == "watching" else "snapshot"
    original = getattr(threads.Supervisor, method)

    def held(self, *args):
        init(self, *args)
        gates.append(Gate(self, 1, after=4))

    def arrived(self, **options):
        """Reports that the main thread is in `method` and module 1 at its gate."""
        if self.workers[1].updates == 4 and gates[0].entered.wait(60):
            reached.set()
        return original(self, **options)

    def hear(self, *args):
        interrupt(self, *args)
        heard.set()

    def twice():
        for moment in (reached, heard):
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
    assert "module_1" in workers(), "the run waited for the stalled worker"
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    gates[0].opened.set()  # lets the abandoned worker end
    assert [m["updates"] for m in train_and_evaluate(threaded(), tmp_path).modules] == [24, 24]
