"""Errors of a training run that a user can cause: one line each, and nothing half-written."""

import errno
import fcntl
from pathlib import Path

import numpy as np
import pytest
from runs import arrays, small_config

from dgl_jax.errors import UserError
from dgl_jax.run.writers import JsonLinesWriter
from dgl_jax.train import train_and_evaluate


@pytest.mark.slow
def test_without_a_checkpoint_the_configuration_may_change(tmp_path):
    with pytest.raises(UserError, match="diverged"):
        train_and_evaluate(small_config(optimizer__learning_rate=1e25), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())
    assert train_and_evaluate(small_config(train__steps=2), tmp_path).steps == 2


def test_unwritable_workdir_is_a_one_line_error(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"cannot write there \(Read-only file system\)"):
        train_and_evaluate(small_config(), tmp_path / "run")


@pytest.mark.slow
def test_backprop_sends_nothing_between_modules(tmp_path):
    with pytest.raises(
        UserError,
        match=r"config\.codec\.name=bf16: config\.method\.name=backprop sends nothing between",
    ):
        train_and_evaluate(small_config(engine__name="backprop", codec__name="bf16"), tmp_path)
    summary = train_and_evaluate(small_config(engine__name="backprop", train__steps=1), tmp_path)
    assert summary.raw_bytes_per_image == summary.wire_bytes_per_image == summary.codec_error == []


def test_second_training_in_the_same_workdir_is_refused(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another training is running there"):
            train_and_evaluate(small_config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


@pytest.mark.slow
def test_divergence_stops_the_run_without_a_bad_checkpoint(tmp_path):
    config = small_config(optimizer__learning_rate=1e12, checkpoint__every=1, log__every=100)
    with pytest.raises(
        UserError,
        match=r"training diverged: .* module_\d .* step \d+; a smaller config\.optimizer\.learning",
    ):
        train_and_evaluate(config, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        assert int(path.name) <= 2
    if any((tmp_path / "checkpoints").iterdir()):
        assert all(np.isfinite(a).all() for a in arrays(tmp_path))


def test_full_disk_is_a_one_line_error(tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLinesWriter, "write_scalars", no_space)
    with pytest.raises(
        UserError, match="the disk is full; free some space and run the same command again"
    ):
        train_and_evaluate(small_config(), tmp_path)


def test_disk_full_while_saving_is_a_one_line_error(tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async", no_space
    )
    with pytest.raises(
        UserError,
        match="checkpoints: the disk is full; free some space and run the same command again",
    ):
        train_and_evaluate(small_config(), tmp_path)


def test_invalid_configuration_creates_no_workdir(tmp_path):
    for fields in ({"model__modules": 9}, {"data__batch_size": 4096}, {"data__image_size": 10}):
        with pytest.raises(UserError):
            train_and_evaluate(small_config(model__name="cnn4", **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
