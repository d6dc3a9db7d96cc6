"""Files of an export: complete, with permissions by the umask, and the old ones after a failure."""

import errno
import json
import os

import numpy as np
import pytest
from runs import small_config

from dgl_jax.errors import UserError
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate

FILES = ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    train_and_evaluate(small_config(train__steps=1), path)
    return path


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def modes(folder):
    return [os.stat(folder / name).st_mode & 0o777 for name in FILES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)]
)
def test_umask_decides_file_permissions(workdir, tmp_path, umask, mask, mode):
    umask(mask)
    folder = export_run(workdir, output=tmp_path / "export")
    assert names(folder) == FILES
    assert modes(folder) == [mode, mode]


def test_runs_and_exports_do_not_overwrite_each_other(workdir, tmp_path):
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"^--output={workdir}: holds a run"):
        export_run(workdir, output=workdir)
    assert (workdir / "config.json").read_bytes() == before
    folder = export_run(workdir, output=tmp_path / "export")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"^--workdir={folder}: holds an export"):
        train_and_evaluate(small_config(train__steps=1), folder)
    assert (folder / "config.json").read_bytes() == before


def test_older_export_is_replaced_atomically(workdir, tmp_path, umask):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("older")
        (folder / name).chmod(0o600)
        os.link(folder / name, tmp_path / name)  # stands for a reader with the old file open
    export_run(workdir, output=folder)
    assert names(folder) == FILES
    assert modes(folder) == [0o644, 0o644]
    assert [(tmp_path / name).read_text() for name in FILES] == ["older", "older"]
    assert json.loads((folder / "config.json").read_text())["step"] == 1
    assert len(load_exported(folder).variables) == 2


def test_full_disk_keeps_the_older_export(workdir, tmp_path, monkeypatch):
    folder = export_run(workdir, output=tmp_path / "export")
    for name in FILES:
        (folder / name).write_text(f"older {name}")
    calls = []

    def fail_on_second_file(descriptor):
        calls.append(os.fstat(descriptor).st_size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_on_second_file)
    with pytest.raises(UserError, match="export: the disk is full; free some space"):
        export_run(workdir, output=folder)
    assert len(calls) == 2  # the first file was complete, but must not replace the old one
    assert min(calls) > 100
    assert names(folder) == FILES
    assert [(folder / name).read_text() for name in FILES] == [f"older {name}" for name in FILES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "got float32 inputs"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"got uint8 inputs of shape \(2, 8, 8, 1\)"),
        (np.zeros((8, 8, 3), np.uint8), r"of shape \(8, 8, 3\)"),
    ],
    ids=["dtype", "channels", "no batch"],
)
def test_examples_that_are_not_as_stored_are_refused(workdir, tmp_path, inputs, message):
    network = load_exported(export_run(workdir, output=tmp_path / "export"))
    assert network.logits(np.zeros((2, 8, 8, 3), np.uint8))[-1].shape == (2, 10)
    with pytest.raises(UserError, match=message):
        network.logits(inputs)
