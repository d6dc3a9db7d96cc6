"""Sweeps in real processes: signals, mistakes on the command line, interrupted sweeps."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from runs import FIELDS, same_run

from dgl_jax import child, system
from dgl_jax.errors import UserError
from dgl_jax.run.signals import Interruption
from dgl_jax.run.workdir import is_locked
from dgl_jax.tools import jobs
from dgl_jax.tools.estimate import newest_record

ROOT = Path(__file__).parents[1]


def test_a_child_stops_when_its_parent_ends():
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        reading, writing = os.pipe()
        thread = threading.Thread(target=child.follow, args=(reading,), daemon=True)
        thread.start()
        os.write(writing, b"x")  # only the end counts
        assert not received.is_set()
        os.close(writing)
        thread.join(60)
        assert received.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reading)


def test_a_child_that_has_received_a_signal_gets_no_second_one():
    interruption = Interruption()
    before = signal.signal(signal.SIGTERM, interruption)
    try:
        interruption(signal.SIGTERM, None)
        reading, writing = os.pipe()
        os.close(writing)
        child.follow(reading)  # a second signal would raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reading)


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", "--mode=sweep", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    folder, shipped = f"--workdir={tmp_path / 'new'}", "--sweep=digits:tiny"
    for arguments, message in [
        ([folder], "--sweep is missing"),
        ([folder, "--sweep=digit"], "--sweep=digit: neither a file nor a sweep"),
        ([folder, "--sweep=digits:huge"], "ValueError: no size 'huge'"),
        ([folder, shipped, "--jobs=0"], "--jobs=0"),
        ([folder, shipped, "--jobs=9999"], "--jobs=9999: there are"),
        ([folder, shipped, "--config=digits"], "--config: does not apply to --mode=sweep"),
        ([folder, shipped, "--config.data.batch_size=1"], "config.data.batch_size=1"),
        ([folder, shipped, "--config.data.batchsize=8"], "batchsize"),
        ([shipped], "--workdir is missing"),
    ]:
        done = launch(*arguments)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_platform_that_jax_cannot_open_is_reported(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=nonsense: JAX cannot open it here"):
        jobs.backend()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert jobs.backend() == ("cpu", 1)


# Holds a run at steps 6 and 9 until a signal arrives, as long as the file HOLD is there.
HOLD = """
import os, signal, time
from dgl_jax.run.record import Record
original = Record.write_training

def write_training(self, step, state):
    original(self, step, state)
    while step in (6, 9) and os.path.exists(os.environ["HOLD"]):
        if signal.getsignal(signal.SIGTERM).signum is not None:
            break
        time.sleep(0.01)

Record.write_training = write_training
"""
SWEEP = """
from dgl_jax.config import default_config

def get_sweep(argument=None):
    for name, rate in (("a/seed=0", 0.05), ("bad", 1e20), ("c", 0.02)):
        config = default_config(("hold",))
        for field, value in {fields!r}.items():
            group, _, leaf = field.rpartition(".")
            setattr(config[group], leaf, value)
        config.optimizer.learning_rate = rate
        config.train.steps = 24
        if argument != "good" or name != "bad":
            yield name, config
"""


@pytest.fixture
def held(tmp_path, monkeypatch) -> Path:
    """Returns a sweep file whose runs are held at steps 6 and 9 while the file `hold` exists."""
    (tmp_path / "hold.py").write_text(HOLD)
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.delenv("NPROC")
    monkeypatch.setitem(sys.modules, "hold", ModuleType("hold"))  # this process holds nothing
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP.format(fields=FIELDS))
    return path


def states(workdir: Path) -> dict[str, str]:
    table = json.loads((workdir / "sweep.json").read_text())["rows"]
    return {name: row["state"] for name, row in table.items()}


def interrupt(path: Path, workdir: Path, step: int, signum: int) -> int:
    """Starts a sweep and sends it a signal when both rows have reached a step."""
    arguments = [f"--sweep={path}:good", f"--workdir={workdir}", "--jobs=2", "--noestimate"]
    command = [sys.executable, "launch.py", "--mode=sweep", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        folders = [workdir / "a" / "seed=0", workdir / "c"]
        while any((newest_record(folder) or {"step": 0})["step"] < step for folder in folders):
            assert process.poll() is None
            time.sleep(0.02)
        assert is_locked(folders[0])
        process.send_signal(signum)
        return process.wait(300)


@pytest.mark.slow
@pytest.mark.skipif((system.cpu_count() or 1) < 2, reason="needs two processors")
def test_stopped_and_killed_sweeps_equal_an_undisturbed_one(held, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    (tmp_path / "hold").touch()
    assert interrupt(held, parts, 6, signal.SIGINT) == 130
    assert states(parts) == {"a/seed=0": "stopped", "c": "stopped"}
    assert (parts / "c" / "checkpoints" / "6").exists()
    # The runs notice that the sweep was killed, and save before they end.
    assert interrupt(held, parts, 9, signal.SIGKILL) == -signal.SIGKILL
    while any(is_locked(parts / name) for name in ("a/seed=0", "c")):
        time.sleep(0.02)
    for name in ("a/seed=0", "c"):
        assert "SIGTERM: stopped at step" in (parts / name / "log.txt").read_text()
    (tmp_path / "hold").unlink()
    done = launch(f"--sweep={held}:good", f"--workdir={parts}", "--jobs=2", "--noestimate")
    assert done.returncode == 0, done.stderr
    assert states(parts) == {"a/seed=0": "finished", "c": "finished"}
    assert "2 to resume, 0 to start; 2 at the same time" in done.stderr
    for name in ("a/seed=0", "c"):
        log = (parts / name / "log.txt").read_text()
        starts = [int(step) for step in re.findall(r"resuming from step (\d+)", log)]
        assert len(starts) == 2
        assert 6 <= starts[0] < 9 <= starts[1] < 24

    # One job at a time, with a row that diverges.
    done = launch(f"--sweep={held}", f"--workdir={whole}")
    assert done.returncode == 1, done.stderr
    assert states(whole) == {"a/seed=0": "finished", "bad": "failed", "c": "finished"}
    table = json.loads((whole / "sweep.json").read_text())
    assert table["sweep"] == str(held)
    assert table["rows"]["bad"]["exit_code"] == 2
    assert "training diverged" in table["rows"]["bad"]["error"]
    assert f"bad failed: {table['rows']['bad']['error']}" in done.stderr
    assert "estimated time: about" in done.stderr
    assert json.loads(done.stdout)["failed"] == ["bad"]
    for name in ("a/seed=0", "c"):
        assert same_run(parts / name, whole / name)
        threads = [
            json.loads((folder / name / "summary.json").read_text())["cpu_threads"]
            for folder in (parts, whole)
        ]
        assert threads == [system.pool_threads()] * 2
    assert not same_run(whole / "a/seed=0", whole / "c")
