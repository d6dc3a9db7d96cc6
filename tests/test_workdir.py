"""Damaged files of a run, unusable paths and full disks: one-line errors that destroy nothing."""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import evaluated_run, records, small_config
from safetensors.numpy import save

from dgl_jax import train
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.run import workdir, writers
from dgl_jax.run.plots import plot
from dgl_jax.run.restore import load_trained
from dgl_jax.run.summary import read_summary
from dgl_jax.tools import export, plan, predict
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.predict import predict_run
from dgl_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return evaluated_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return path


def unwanted(*args, **kwargs):
    pytest.fail("started work whose result cannot be written")


# config.json and summary.json


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"garbage", "Expecting value"),
        (b"[1,2]", r"it holds \[1, 2\], not an object"),
        (b"null", "it holds null, not an object"),
        (b'{"model": {"width": 4', "Expecting"),
        (b"\xff\xfe", "can't decode"),
        (b'{"model": {"widht": 4}}', "config.model.widht: no such field"),
        (b'{"model": 3}', "config.model=3: a group of fields"),
        (None, "no such file"),
    ],
)
def test_unreadable_configuration_is_a_one_line_error_in_every_mode(
    copy, tmp_path, monkeypatch, content, reason
):
    monkeypatch.setattr(train, "make_experiment", unwanted)
    path = copy / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    before = sorted(copy.rglob("*"))
    calls = [
        lambda: train_and_evaluate(small_config(), copy),
        lambda: train_and_evaluate(small_config(train__steps=8), copy),  # whose summary exists
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
    assert plot(copy)  # plots need no configuration
    shutil.copytree(copy, tmp_path / "export")
    if content != b'{"model": 3}':
        with pytest.raises(UserError, match=r"config.json: "):
            load_exported(tmp_path / "export")


@pytest.mark.parametrize(
    "change",
    [
        lambda summary: summary.update(modules=[]),
        lambda summary: summary.update(modules=[3]),
        lambda summary: summary.update(ensemble_accuracy="high"),
        lambda summary: summary["modules"][0].pop("test_accuracy"),
        lambda summary: summary["modules"][1].update(test_accuracy="0.5"),
        lambda summary: summary["modules"][1].update(updates=None),
        lambda summary: summary.update(steps=float("nan")),
        lambda summary: summary.update(epochs=float("inf")),
    ],
)
def test_summary_with_wrong_values_counts_as_missing(copy, change, caplog):
    summary = json.loads((copy / "summary.json").read_text())
    assert read_summary(copy).modules == summary["modules"]
    change(summary)
    (copy / "summary.json").write_text(json.dumps(summary))
    assert read_summary(copy) is None
    assert "summary.json cannot be read" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b'{"engine": "fused", "con', b'{"steps": 8}', b"\xff", b"[" * 200_000],
    ids=["empty", "no fields", "list", "cut", "one field", "not text", "deep"],
)
def test_unreadable_summary_counts_as_missing(copy, content, caplog):
    before_damage = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_bytes(content)
    assert [path.name for path in plot(copy)] == ["accuracy.png", "loss.png"]
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert workdir.finished(copy, workdir.load_settings(copy / "config.json")) is None
    assert "summary.json cannot be read" in caplog.text
    if content == b"{}":
        before = records(copy)
        config = small_config(train__steps=8, checkpoint__every=2, eval__every=6)
        summary = train_and_evaluate(config, copy)
        assert summary.ensemble_accuracy == before_damage["ensemble_accuracy"]
        assert records(copy) == before
        assert json.loads((copy / "summary.json").read_text())["steps"] == 8


# Places that cannot be written


@pytest.fixture
def stray(tmp_path) -> Path:
    """Returns the path of a file where a folder is needed."""
    path = tmp_path / "file"
    path.write_text("unchanged")
    return path


def test_unwritable_output_is_reported_before_the_work(run, image, stray, tmp_path, monkeypatch):
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
    assert stray.read_text() == "unchanged"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv"]


def test_training_in_an_unwritable_workdir_is_refused(stray, monkeypatch):
    monkeypatch.setattr(train, "make_experiment", unwanted)
    for path in (stray, stray / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"^--workdir={path}: "):
            train_and_evaluate(small_config(), path)


def refused(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied", "somewhere")


def test_folder_without_write_permission(run, copy, monkeypatch, image, tmp_path):
    # Tests may run as root, who can write everywhere, so the error is injected.
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
        # A finished run writes nothing and needs no permission.
        assert train_and_evaluate(small_config(train__steps=8), copy).steps == 8
    with monkeypatch.context() as patch:  # the permission is lost between the check and the writing
        patch.setattr(writers.os, "fsync", refused)
        with pytest.raises(UserError, match=r"plots/accuracy.png: cannot write there"):
            plot(copy)
        with pytest.raises(UserError, match=r"^--output=.*: cannot write there"):
            predict_run(copy, "newest", [str(image)], tmp_path / "out" / "a.csv")
    assert list((tmp_path / "out").iterdir()) == []


def test_unwritable_parts_of_a_workdir(copy):
    config = small_config(train__steps=8, checkpoint__every=2, eval__every=6)
    shutil.rmtree(copy / "plots")
    (copy / "plots").write_text("")
    (copy / "summary.json").unlink()
    assert train_and_evaluate(config, copy).steps == 8  # a run may finish without plots
    (copy / "summary.json").unlink()
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read or written"):
        train_and_evaluate(config, copy)


# Names that are not ASCII


ODD = "caf\udce9 ñ 日本\n.png"  # one byte is not valid UTF-8


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", None])
def test_file_names_of_any_bytes_are_written_unchanged(run, image, tmp_path, capfdbinary, suffix):
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


def test_stdout_without_a_byte_buffer(capsys):
    writers.write_stdout("ñ\n")
    assert capsys.readouterr().out == "ñ\n"


def test_longest_file_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    writers.write_text(path, "ñ\udce9")
    assert path.read_bytes() == b"\xc3\xb1\xe9"


def test_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workdir.lock(tmp_path / "run"):
        assert f"--workdir={tmp_path}/run: cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: path.write_bytes(save({"a": np.zeros(1)})), "lacks module_0/"),
    ],
    ids=["missing", "truncated", "incomplete"],
)
def test_damaged_export_is_one_line(run, tmp_path, change, message):
    folder = export_run(run, output=str(tmp_path / "export"))
    change(Path(folder) / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: {message}.*; export the run again"):
        load_exported(folder)
