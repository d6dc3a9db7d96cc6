"""Checkpoints: unusable paths, damaged or replaced files, and one-line errors."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import evaluated_run, records, small_config

from dgl_jax import train
from dgl_jax.errors import UserError
from dgl_jax.run import checkpoint, checkpoint_folder, workdir
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.restore import load_trained
from dgl_jax.train import train_and_evaluate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    # Of a shipped network, which another process knows too.
    return evaluated_run(tmp_path_factory.mktemp("run"), model__name="cnn4")


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def unwanted(*args, **kwargs):
    pytest.fail("started work whose result cannot be written")


# Paths below which Orbax cannot read checkpoints


@pytest.mark.parametrize(
    ("name", "characters"),
    [
        ("a[b", "["),
        ("a]b", "]"),
        ("x\\y", "\\"),
        ("a*", "*"),
        ("a?", "?"),
        ("gs:/a", "gs:/"),
        ("a\udce9", "bytes that are not UTF-8"),
    ],
)
def test_path_with_unreadable_characters_is_refused(tmp_path, monkeypatch, name, characters):
    monkeypatch.setattr(train, "make_experiment", unwanted)
    message = re.escape(f"checkpoints under a path with {characters} cannot be read back")
    for path in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(UserError, match=f"^--workdir={re.escape(str(path))}: {message}"):
            train_and_evaluate(small_config(), path)
        with pytest.raises(UserError, match=f"^--init_from=.*{message}"):
            load_trained(path, flag="--init_from")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_absolute_path_is_checked_and_a_symbolic_link_helps(run, tmp_path, monkeypatch):
    (tmp_path / "run[1]").mkdir()
    monkeypatch.chdir(tmp_path / "run[1]")
    with pytest.raises(
        UserError,
        match=r"--workdir=here \(that is .*/run\[1\]/here\): checkpoints under a path with \[",
    ):
        train_and_evaluate(small_config(), "here")
    (tmp_path / "link").symlink_to(tmp_path / "run[1]")
    shutil.copytree(run, tmp_path / "link" / "here")
    assert load_trained(tmp_path / "link" / "here").restored.step == 8
    with pytest.raises(UserError, match=r"--workdir=here \(that is .*cannot be read back"):
        load_trained(Path("here"))


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("é日本😀", "%20#{a,b}~$HOME", "-a.b@c;d&e|f'\"", "x" * 255, "new\nline")
        ),
    ],
)
def test_checkpoints_work_below_unusual_paths(run, tmp_path, name):
    state = load_trained(run).restored.state
    folder = tmp_path / name / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"a": 1})  # also reads it back
    checkpoints.close()
    assert Checkpoints(folder, read_only=True).meta(3)["a"] == 1


def test_unreadable_checkpoint_stops_the_run_at_once(tmp_path, monkeypatch):
    # Without the check of the path, the run must stop at its first checkpoint, not after its last.
    monkeypatch.setattr(checkpoint_folder, "_PATTERN", "")
    with pytest.raises(
        UserError,
        match=r"checkpoint 2 was written but cannot be read back \(.*use a --workdir",
    ):
        train_and_evaluate(small_config(checkpoint__every=2), tmp_path / "run[1]")
    assert [record["step"] for record in records(tmp_path / "run[1]") if record["step"] > 2] == []


@pytest.mark.medium
def test_only_the_first_checkpoint_of_a_process_is_read_back(run, tmp_path, monkeypatch):
    state, reads = load_trained(run).restored.state, []
    load = checkpoint.ocp.load_checkpointables
    monkeypatch.setattr(
        checkpoint.ocp,
        "load_checkpointables",
        lambda path, wanted: reads.append(path.name) or load(path, wanted),
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, state, {})
    checkpoints.close()
    assert reads == ["1"]


# Checkpoints that are damaged, removed or only look like checkpoints


def test_changed_digit_in_the_metadata_is_detected(copy, caplog):
    path = copy / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    text = path.read_text()
    std = re.search(r'std\\*": \[0\.(\d)', text)
    digit = str((int(std[1]) + 4) % 10)
    path.write_text(text[: std.start(1)] + digit + text[std.end(1) :])
    assert json.loads(path.read_text())  # still valid JSON
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 6
    assert "checkpoint 8 is damaged (its metadata do not match their checksum)" in caplog.text
    with pytest.raises(UserError, match="checkpoint 8 is damaged"):
        load_trained(copy, "8")


def test_renamed_checkpoint_is_damaged(copy, caplog):
    (copy / "checkpoints" / "8").rename(copy / "checkpoints" / "99")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 6
    assert "checkpoint 99 is damaged (it was written as checkpoint 8)" in caplog.text


def test_best_checkpoint_with_damaged_metadata_is_reported(copy, caplog):
    path = copy / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("std", "sdt", 1))
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert Checkpoints(copy / "checkpoints", read_only=True).select("best") == [6]
    assert "checkpoint 8 is damaged (its metadata do not match their checksum)" in caplog.text


@pytest.mark.medium
@pytest.mark.parametrize("text", ["", '{"accuracy": "x"}', '{"acc": 1}', '{"accuracy": 7.0}'])
def test_damaged_accuracy_is_replaced_by_the_metadata(copy, text, caplog):
    path = copy / "checkpoints" / "8" / "metrics" / "metrics"
    before = json.loads(path.read_text())
    path.write_text(text)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        Checkpoints(copy / "checkpoints").close()
    assert f"{path}: is damaged, and replaced by what the metadata say" in caplog.text
    assert json.loads(path.read_text()) == before
    caplog.clear()
    Checkpoints(copy / "checkpoints").close()
    assert caplog.text == ""


def test_errors_of_the_caller_are_no_damage(copy):
    def fails(meta):
        raise RuntimeError("no such device")

    checkpoints = Checkpoints(copy / "checkpoints", read_only=True)
    with pytest.raises(RuntimeError, match="no such device"):
        checkpoints.restore(fails)


@pytest.mark.medium
def test_files_named_like_checkpoints_are_ignored(copy, caplog):
    (copy / "checkpoints" / "10").mkdir()
    (copy / "checkpoints" / "12").write_text("a file")
    assert load_trained(copy).restored.step == 8
    with pytest.raises(
        UserError, match=r"--checkpoint=10: no such checkpoint; use newest, best, 6, 8$"
    ):
        load_trained(copy, "10")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert (
            train_and_evaluate(
                small_config(model__name="cnn4", train__steps=12, checkpoint__every=2), copy
            ).steps
            == 12
        )
    assert "damaged (" not in caplog.text
    assert "checkpoints/10 is not a checkpoint: moved to" in caplog.text
    assert load_trained(copy).restored.step == 12
    assert (
        {"10", "12"}
        <= {path.name for path in (copy / "checkpoints").iterdir()}
        <= {"6", "8", "10", "12"}
    )


def test_empty_folder_does_not_count_as_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "50").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    assert not workdir.holds_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_trained(tmp_path)


def set_step(checkpoint: Path, step: int) -> None:
    """Gives a checkpoint the metadata of another step."""
    path = checkpoint / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    text = json.dumps(json.loads(stored["custom_metadata"]["meta"]) | {"step": step})
    custom = {"meta": text, "checksum": zlib.crc32(text.encode())}
    path.write_text(json.dumps(stored | {"custom_metadata": custom}))


def replaced_while_reading(monkeypatch, folder: Path, times: int = 1) -> None:
    """Simulates a training that replaces the checkpoints after they are listed, before one is read.

    It saves a newer checkpoint and removes the older ones.
    """
    described = Checkpoints._described
    moves = []

    def described_too_late(self, step):
        if len(moves) < times:
            moves.append(step)
            newest = max(map(int, os.listdir(folder)))
            copied = shutil.copytree(folder / str(newest), folder / f"{newest + 1}.tmp")
            set_step(copied, newest + 1)
            (folder / f"{newest + 1}.tmp").rename(folder / str(newest + 1))
            for other in list(folder.iterdir()):
                if other.name != str(newest + 1):
                    shutil.rmtree(other)
        return described(self, step)

    monkeypatch.setattr(Checkpoints, "_described", described_too_late)


@pytest.mark.parametrize("times", [1, 3])
def test_replaced_checkpoints_are_not_reported_as_damaged(copy, monkeypatch, caplog, times):
    replaced_while_reading(monkeypatch, copy / "checkpoints", times)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 8 + times
    assert "damaged" not in caplog.text


def test_replaced_checkpoint_chosen_by_step_or_as_best(copy, monkeypatch):
    replaced_while_reading(monkeypatch, copy / "checkpoints")
    with pytest.raises(
        UserError, match=r"--checkpoint=6: no such checkpoint; use newest, best, 9$"
    ):
        load_trained(copy, "6")
    # Checkpoint 9 is a copy of 8, with its accuracy.
    monkeypatch.undo()
    best = Checkpoints(copy / "checkpoints", read_only=True).select("best")
    replaced_while_reading(monkeypatch, copy / "checkpoints")
    assert best == [9]
    assert load_trained(copy, "best").restored.step == 10


def test_checkpoints_replaced_too_fast_are_a_one_line_error(copy, monkeypatch):
    replaced_while_reading(monkeypatch, copy / "checkpoints", 100)
    with pytest.raises(UserError, match="replaces checkpoints faster than they can be read"):
        load_trained(copy)


def test_twin_damaged_checkpoint_is_reported_as_damaged(copy, monkeypatch, caplog):
    for file in (copy / "checkpoints" / "8").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 6
    assert "checkpoint 8 is damaged" in caplog.text
    replaced_while_reading(monkeypatch, copy / "checkpoints")  # by copies of the damaged one
    with pytest.raises(UserError, match="checkpoint 9 is damaged"):
        load_trained(copy)


def test_checkpoint_of_another_network_is_not_called_damaged(copy, caplog):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["model"]["width"] += 4
    path.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"/8: holds another network: the shape of module_0/\S+ is \("
    ):
        load_trained(copy)
    assert "damaged" not in caplog.text


def test_a_damaged_checkpoint_prints_one_line(copy):
    """Checks the log of a process: reads that a failed one leaves behind print tracebacks."""
    for file in (copy / "checkpoints").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    command = [sys.executable, "launch.py", "--mode=eval", f"--workdir={copy}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    steps = len(list((copy / "checkpoints").glob("[0-9]*")))
    *lines, error = done.stderr.splitlines()
    assert error.startswith(f"error: {copy}/checkpoints: every checkpoint (")
    assert len(lines) == steps, done.stderr
    assert all(" is damaged (" in line for line in lines)


def test_reads_that_end_late_stay_hidden(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(str(error)))
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append("unraisable"))
    for _ in range(2):
        with checkpoint_folder.quiet():
            sys.excepthook(ValueError, ValueError("hidden"), None)
    for text in ("Event loop is closed", "another"):
        sys.excepthook(RuntimeError, RuntimeError(text), None)
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert shown == ["another", "unraisable"]


@pytest.mark.parametrize("which", ["train", "load_trained"])
def test_file_in_place_of_the_checkpoints_is_reported_at_once(copy, monkeypatch, which):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").write_text("")
    monkeypatch.setattr(train, "make_experiment", unwanted)
    with pytest.raises(
        UserError, match="checkpoints: is a file but must be a folder; move it away"
    ):
        train_and_evaluate(small_config(), copy) if which == "train" else load_trained(copy)


def test_unwritable_checkpoints_are_a_one_line_error(run, tmp_path, monkeypatch):
    state = load_trained(run).restored.state
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for error in (
        PermissionError(errno.EACCES, "Permission denied", "x"),
        ValueError("PERMISSION_DENIED: Error opening file"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(
                "orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async", fail
            )
            with pytest.raises(UserError, match=r"checkpoints: cannot write there \(P"):
                checkpoints.save(1, state, {})
    checkpoints.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints: cannot write there"):
        Checkpoints(tmp_path / "file" / "checkpoints")
