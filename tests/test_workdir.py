"""What is wrong with the files of a run, or with where they are to be: one line, and what is whole stays whole."""

import errno
import json
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import records, small_config

from dgl_jax import export, train
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.export import export_run, load_exported
from dgl_jax.run import checkpoint, workdir, writers
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.plots import plot
from dgl_jax.run.restore import load_trained
from dgl_jax.tools import plan, predict
from dgl_jax.tools.predict import predict_run
from dgl_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The workdir of a short run: checkpoints 6 and 8, both evaluated."""
    path = tmp_path_factory.mktemp("run")
    train_and_evaluate(small_config(train__steps=8, checkpoint__every=2, eval__every=6), path)
    return path


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return path


def unwanted(*args, **kwargs):
    pytest.fail("begun, though it cannot end")


# Paths that Orbax cannot read behind


@pytest.mark.parametrize(
    ("name", "named"),
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
def test_paths_that_checkpoints_cannot_be_read_from(tmp_path, monkeypatch, name, named):
    monkeypatch.setattr(train, "make_experiment", unwanted)
    message = re.escape(f"checkpoints under a path with {named} cannot be read back")
    for path in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(UserError, match=f"^--workdir={re.escape(str(path))}: {message}"):
            train_and_evaluate(small_config(), path)
        with pytest.raises(UserError, match=f"^--init_from=.*{message}"):
            load_trained(path, flag="--init_from")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_absolute_path_counts_and_a_link_helps(run, tmp_path, monkeypatch):
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
def test_paths_that_checkpoints_can_be_read_from(run, tmp_path, name):
    state = load_trained(run).restored.state
    folder = tmp_path / name / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"a": 1})  # reads it back
    checkpoints.close()
    assert Checkpoints(folder, read_only=True).meta(3)["a"] == 1


def test_the_first_checkpoint_is_read_back_before_the_run_goes_on(tmp_path, monkeypatch):
    """A path that Orbax cannot read, as if nobody knew of it: the run ends at its first checkpoint, not after its last."""
    monkeypatch.setattr(checkpoint, "_PATTERN", "")
    with pytest.raises(
        UserError,
        match=r"checkpoint 2 was written there and cannot be read back \(.*use a --workdir",
    ):
        train_and_evaluate(small_config(checkpoint__every=2), tmp_path / "run[1]")
    assert [record["step"] for record in records(tmp_path / "run[1]") if record["step"] > 2] == []


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


# Checkpoints that are there, gone, or none


def test_a_changed_digit_in_the_metadata_is_noticed(copy, caplog):
    path = copy / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    text = path.read_text()
    std = re.search(r'std\\*": \[0\.(\d)', text)
    digit = str((int(std[1]) + 4) % 10)
    path.write_text(text[: std.start(1)] + digit + text[std.end(1) :])
    assert json.loads(path.read_text())  # still sound JSON
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 6
    assert (
        "checkpoint 8 is damaged (its metadata do not have the checksum they were saved with)"
        in caplog.text
    )
    with pytest.raises(UserError, match="checkpoint 8 is damaged"):
        load_trained(copy, "8")


def test_checkpoints_without_a_checksum_of_their_metadata_are_read(copy):
    path = copy / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    text = stored["custom_metadata"]["meta"]
    assert stored["custom_metadata"]["checksum"] == zlib.crc32(text.encode())
    older = {key: value for key, value in json.loads(text).items() if key != "accuracy"}
    path.write_text(json.dumps(stored | {"custom_metadata": {"meta": json.dumps(older)}}))
    assert load_trained(copy).restored.step == 8
    path.write_text(
        json.dumps(stored | {"custom_metadata": {"meta": json.dumps(older), "chec+sum": 1}})
    )
    assert load_trained(copy).restored.step == 6


def test_an_older_best_checkpoint_is_found(copy):
    for step in ("6", "8"):  # as they were written before the accuracy was part of the metadata
        path = copy / "checkpoints" / step / "_CHECKPOINT_METADATA"
        stored = json.loads(path.read_text())
        older = {
            key: value
            for key, value in json.loads(stored["custom_metadata"]["meta"]).items()
            if key != "accuracy"
        }
        path.write_text(json.dumps(stored | {"custom_metadata": {"meta": json.dumps(older)}}))
        (copy / "checkpoints" / step / "metrics" / "metrics").write_text(
            json.dumps({"accuracy": 0.9 if step == "6" else 0.8})
        )
    assert Checkpoints(copy / "checkpoints", read_only=True).select("best") == [6]


def test_what_only_has_the_name_of_a_checkpoint_is_none(copy, caplog):
    (copy / "checkpoints" / "10").mkdir()
    (copy / "checkpoints" / "12").write_text("a file")
    assert load_trained(copy).restored.step == 8
    with pytest.raises(UserError, match=r"--checkpoint=10: there are: newest, best, 6, 8$"):
        load_trained(copy, "10")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert (
            train_and_evaluate(small_config(train__steps=12, checkpoint__every=2), copy).steps == 12
        )
    assert "damaged (" not in caplog.text
    assert "checkpoints/10 is no checkpoint: moved to" in caplog.text
    assert load_trained(copy).restored.step == 12
    assert (
        {"10", "12"}
        <= {path.name for path in (copy / "checkpoints").iterdir()}
        <= {"6", "8", "10", "12"}
    )


def test_a_workdir_with_an_empty_folder_for_a_checkpoint_begins_anew(tmp_path):
    (tmp_path / "checkpoints" / "50").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    assert not workdir.holds_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_trained(tmp_path)


def replaced_while_reading(monkeypatch, folder: Path, times: int = 1) -> None:
    """A training that saves a newer checkpoint and removes the older ones, between listing them and reading one."""
    meta = Checkpoints.meta
    moves = []

    def meta_too_late(self, step):
        if len(moves) < times:
            moves.append(step)
            newest = max(map(int, os.listdir(folder)))
            shutil.copytree(folder / str(newest), folder / f"{newest + 1}.tmp")
            (folder / f"{newest + 1}.tmp").rename(folder / str(newest + 1))
            for other in list(folder.iterdir()):
                if other.name != str(newest + 1):
                    shutil.rmtree(other)
        return meta(self, step)

    monkeypatch.setattr(Checkpoints, "meta", meta_too_late)


@pytest.mark.parametrize("times", [1, 3])
def test_checkpoints_that_a_training_replaces_are_not_damaged(copy, monkeypatch, caplog, times):
    replaced_while_reading(monkeypatch, copy / "checkpoints", times)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 8 + times
    assert "damaged" not in caplog.text


def test_a_step_and_the_best_that_a_training_replaces(copy, monkeypatch):
    replaced_while_reading(monkeypatch, copy / "checkpoints")
    with pytest.raises(UserError, match=r"--checkpoint=6: there are: newest, best, 9$"):
        load_trained(copy, "6")
    # The copy, 9, holds the accuracy of 8.
    monkeypatch.undo()
    best = Checkpoints(copy / "checkpoints", read_only=True).select("best")
    replaced_while_reading(monkeypatch, copy / "checkpoints")
    assert best == [9]
    assert load_trained(copy, "best").restored.step == 10


def test_a_training_too_fast_to_read_from_is_one_line(copy, monkeypatch):
    replaced_while_reading(monkeypatch, copy / "checkpoints", 100)
    with pytest.raises(UserError, match="replaces checkpoints faster than they can be read"):
        load_trained(copy)


def test_twin_a_checkpoint_that_is_there_and_wrong_is_damaged(copy, monkeypatch, caplog):
    for file in (copy / "checkpoints" / "8").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert load_trained(copy).restored.step == 6
    assert "checkpoint 8 is damaged" in caplog.text
    replaced_while_reading(monkeypatch, copy / "checkpoints")  # by copies of the damaged one
    with pytest.raises(UserError, match="checkpoint 9 is damaged"):
        load_trained(copy)


@pytest.mark.parametrize("which", ["train", "load_trained"])
def test_a_file_in_place_of_the_checkpoints_is_said_at_once(copy, monkeypatch, which):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").write_text("")
    monkeypatch.setattr(train, "make_experiment", unwanted)
    with pytest.raises(
        UserError, match="checkpoints: is a file, and must be a folder; move it away"
    ):
        train_and_evaluate(small_config(), copy) if which == "train" else load_trained(copy)


# config.json and summary.json


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"garbage", "Expecting value"),
        (b"[1,2]", "it holds list and not an object"),
        (b'{"model": {"width": 4', "Expecting"),
        (b"\xff\xfe", "can't decode"),
        (b'{"model": {"widht": 4}}', "config.model.widht: no such field"),
        (b'{"model": 3}', "config.model=3: a group of fields"),
        (None, "no such file"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_line_in_every_mode(
    copy, tmp_path, monkeypatch, content, reason
):
    monkeypatch.setattr(train, "make_experiment", unwanted)
    path = copy / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    before = sorted(copy.rglob("*"))
    calls = [
        lambda: train_and_evaluate(small_config(), copy),
        lambda: train_and_evaluate(small_config(train__steps=8), copy),  # which has a summary
        lambda: workdir.get_config(str(copy)),
    ]
    if content is not None:
        calls += [
            lambda: evaluate_run(copy),
            lambda: export_run(copy),
            lambda: load_trained(copy, flag="--init_from"),
        ]
    for call in calls:
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{reason}"):
            call()
    if content is None:
        with pytest.raises(
            UserError, match=r"^--init_from=.*copy: holds no run \(no config.json\)"
        ):
            load_trained(copy, flag="--init_from")
    assert sorted(copy.rglob("*")) == before
    assert plot(copy)  # needs none
    shutil.copytree(copy, tmp_path / "export")
    if content != b'{"model": 3}':
        with pytest.raises(UserError, match=r"config.json: "):
            load_exported(tmp_path / "export")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"engine": "fused", "con', b'{"steps": 8}', b"\xff"]
)
def test_a_summary_that_cannot_be_read_counts_as_none(copy, content, caplog):
    whole = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_bytes(content)
    assert [path.name for path in plot(copy)] == ["accuracy.png", "loss.png"]
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert workdir.finished(copy, workdir.load_settings(copy / "config.json")) is None
    assert "summary.json cannot be read" in caplog.text
    if content == b"{}":
        before = records(copy)
        config = small_config(train__steps=8, checkpoint__every=2, eval__every=6)
        assert train_and_evaluate(config, copy).ensemble_accuracy == whole["ensemble_accuracy"]
        assert records(copy) == before
        assert json.loads((copy / "summary.json").read_text())["steps"] == 8


# Places that cannot be written


@pytest.fixture
def stray(tmp_path) -> Path:
    """A file where a folder is needed."""
    path = tmp_path / "file"
    path.write_text("kept")
    return path


def test_output_that_cannot_be_written_is_said_before_the_work(
    run, image, stray, tmp_path, monkeypatch
):
    for module in (predict, export):
        monkeypatch.setattr(module, "load_trained", unwanted)
    (tmp_path / "folder.csv").mkdir()
    for output, reason in (
        (stray / "a.csv", "Not a directory"),
        (stray / "b" / "a.csv", "Not a directory"),
        (tmp_path / "folder.csv", "Is a directory"),
        ("/proc/nowhere/a.csv", "No such file or directory"),
        (tmp_path / f"{'x' * 300}" / "a.csv", "File name too long"),
    ):
        with pytest.raises(
            UserError, match=rf"^--output={re.escape(str(output))}: cannot write there \({reason}\)"
        ):
            predict_run(run, "newest", [str(image)], output)
    for output in (stray, stray / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"^--output={output}: cannot write there"):
            export_run(run, output=output)
    monkeypatch.setattr(plan, "plan", unwanted)
    with pytest.raises(UserError, match=f"^--output={stray}/a.png: cannot write there"):
        plan.plan_run(workdir.load_settings(run / "config.json"), output=f"{stray}/a.png")
    with pytest.raises(UserError, match=f"^{stray}/plots/plan.png: cannot write there"):
        plan.plan_run(workdir.load_settings(run / "config.json"), workdir=str(stray))
    assert stray.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv"]


def test_training_where_nothing_can_be_written(stray, monkeypatch):
    monkeypatch.setattr(train, "make_experiment", unwanted)
    for path in (stray, stray / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"^--workdir={path}: "):
            train_and_evaluate(small_config(), path)


def refused(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied", "somewhere")


def test_a_folder_of_somebody_elses(run, copy, monkeypatch, image, tmp_path):
    """Root may write everywhere, so the refusal is put where the system would give it."""
    with monkeypatch.context() as patch:
        patch.setattr(writers.tempfile, "TemporaryFile", refused)
        with pytest.raises(
            UserError, match=r"^--workdir=.*copy: cannot write there \(Permission denied\)"
        ):
            train_and_evaluate(small_config(), copy)
        with pytest.raises(
            UserError, match=r"^.*copy/plots: cannot write there \(Permission denied\)"
        ):
            plot(copy)
        with pytest.raises(
            UserError, match=r"^--output=.*copy/export: cannot write there \(Permission denied\)"
        ):
            export_run(copy)
        # What writes nothing there needs no permission.
        assert train_and_evaluate(small_config(train__steps=8), copy).steps == 8
    with monkeypatch.context() as patch:  # permitted at first, and no more at the end
        patch.setattr(writers.os, "fsync", refused)
        with pytest.raises(UserError, match=r"plots/accuracy.png: cannot write there"):
            plot(copy)
        with pytest.raises(UserError, match=r"^--output=.*: cannot write there"):
            predict_run(copy, "newest", [str(image)], tmp_path / "out" / "a.csv")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_part_of_the_workdir_that_cannot_be_written(copy):
    config = small_config(train__steps=8, checkpoint__every=2, eval__every=6)
    shutil.rmtree(copy / "plots")
    (copy / "plots").write_text("")
    (copy / "summary.json").unlink()
    assert train_and_evaluate(config, copy).steps == 8  # a run is whole without pictures
    (copy / "summary.json").unlink()
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read or written"):
        train_and_evaluate(config, copy)


def test_checkpoints_that_cannot_be_written(run, tmp_path, monkeypatch):
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


# Names that are not ASCII


ODD = "caf\udce9 ñ 日本\n.png"  # one byte of it is no UTF-8


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", None])
def test_names_of_any_bytes_are_predicted_and_written_as_they_were(
    run, image, tmp_path, capfdbinary, suffix
):
    path = tmp_path / ODD
    shutil.copy(image, path)
    output = suffix and tmp_path / f"out{suffix}"
    predict_run(run, "newest", [str(path)], output)
    written = output.read_bytes() if output else capfdbinary.readouterr().out
    if suffix == ".jsonl":
        assert os.fsencode(json.loads(written)["image"]) == os.fsencode(path)
    else:
        assert written.startswith(
            b'image,label,probability,ensemble_label,ensemble_probability\n"'
            + os.fsencode(path)
            + b'",'
        )


def test_text_to_a_stream_without_bytes(capsys):
    writers.write_stdout("ñ\n")
    assert capsys.readouterr().out == "ñ\n"


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    writers.write_text(path, "ñ\udce9")
    assert path.read_bytes() == b"\xc3\xb1\xe9"
