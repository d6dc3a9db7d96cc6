"""Stopping, resuming and what can go wrong with a workdir (invariant 5 for the synchronous engines)."""

import errno
import fcntl
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import arrays, records, same_run, small_config

from dgl_jax import train
from dgl_jax.data.memory import ArraySource
from dgl_jax.engines import EngineState
from dgl_jax.errors import UserError
from dgl_jax.run import loop
from dgl_jax.run.checkpoint import Checkpoints, checkpoint_steps
from dgl_jax.run.due import Due
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.metrics import Window
from dgl_jax.run.restore import load_trained
from dgl_jax.run.signals import Interrupted
from dgl_jax.run.writers import JsonLinesWriter
from dgl_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The workdir of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    train_and_evaluate(small_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped_at_5(tmp_path_factory) -> Path:
    """The workdir of a run that a signal stopped at step 5; see `stopped`."""
    workdir = tmp_path_factory.mktemp("stopped")
    interrupted(workdir, 5)
    return workdir


@pytest.fixture
def stopped(stopped_at_5, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped_at_5, tmp_path / "stopped"))


def interrupt_at(step: int, monkeypatch, signum: int = signal.SIGTERM) -> None:
    """The signal comes when the step's report does."""
    add, raised = Window.add, []

    def add_and_raise(self, report):
        add(self, report)
        if report.updates[-1] >= step and not raised:
            raised.append(True)
            signal.raise_signal(signum)

    monkeypatch.setattr(Window, "add", add_and_raise)


def interrupted(workdir: Path, step: int, config=None, signum: int = signal.SIGTERM) -> int:
    """Runs until a signal at `step`; gives the step of the checkpoint it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch, signum)
        with pytest.raises(Interrupted) as stopped:
            train_and_evaluate(config or small_config(), workdir)
    assert stopped.value.signum == signum
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("place", [(Evaluator, "evaluate"), (Due, "next_event")])
def test_a_signal_between_steps_is_followed_by_a_checkpoint(place, tmp_path, monkeypatch):
    """At step 6 an evaluation is due and a checkpoint is not: the signal comes meanwhile, or as the next steps are to begin."""
    function, calls = getattr(*place), []

    def signalled(*args):
        calls.append(args)
        if len(calls) == {"evaluate": 1, "next_event": 3}[place[1]]:  # steps up to 4, 6 and 8
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(*place, signalled)
    with pytest.raises(Interrupted):
        train_and_evaluate(small_config(), tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "step"), [(signal.SIGTERM, 5), (signal.SIGINT, 7)])
def test_a_stopped_run_ends_as_if_it_had_not_been(whole, tmp_path, signum, step):
    saved = interrupted(tmp_path, step, signum=signum)
    assert step <= saved < step + 4  # what was in flight is finished, nothing more
    assert not (tmp_path / "summary.json").exists()
    summary = train_and_evaluate(small_config(), tmp_path)
    assert summary.steps == 12
    assert [m["updates"] for m in summary.modules] == [12, 12]
    assert same_run(whole, tmp_path)


@pytest.mark.slow
def test_twin_resuming_with_the_wrong_batches_is_noticed(whole, stopped, monkeypatch):
    batches = ArraySource.batches
    monkeypatch.setattr(
        ArraySource, "batches", lambda self, start, *shard: batches(self, 0, *shard)
    )
    train_and_evaluate(small_config(), stopped)
    assert not same_run(whole, stopped)


@pytest.mark.slow
def test_twin_losing_the_optimizer_state_is_noticed(whole, stopped, monkeypatch):
    restore = Checkpoints.restore

    def without_momentum(self, *args, **kwargs):
        restored = restore(self, *args, **kwargs)
        zero = tuple(
            m.replace(
                opt_state=jax.tree.map(lambda x: x * 0 if x.dtype == np.float32 else x, m.opt_state)
            )
            for m in restored.state.modules
        )
        return type(restored)(restored.step, EngineState(zero), restored.meta)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", without_momentum)
        train_and_evaluate(small_config(), stopped)
    assert not same_run(whole, stopped)


@pytest.mark.slow
def test_a_run_goes_on_with_another_engine_and_other_devices(whole, stopped):
    config = small_config(engine__name="pipeline", engine__group_sizes=(1, 1))
    summary = train_and_evaluate(config, stopped)
    assert summary.engine == "pipeline"
    assert summary.wire == "measured"
    assert [m["devices"] for m in summary.modules] == [[0], [1]]
    assert len(jax.devices()) == 4  # the first part ran on one group of all four
    for a, b in zip(arrays(whole), arrays(stopped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.full_compile
@pytest.mark.slow
def test_one_device_pipeline_and_fused_share_a_checkpoint_bit_for_bit(tmp_path):
    alone = {"engine__group_sizes": (1, 1)}
    train_and_evaluate(small_config(engine__name="pipeline", **alone), tmp_path / "pipeline")
    interrupted(tmp_path / "both", 5, small_config(engine__name="pipeline", **alone))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        train_and_evaluate(small_config(engine__name="fused"), tmp_path / "both")
    assert same_run(tmp_path / "pipeline", tmp_path / "both")


@pytest.mark.slow
def test_backprop_resumes_bit_for_bit_and_has_no_lower_heads(tmp_path):
    config = small_config(engine__name="backprop")
    train_and_evaluate(config, tmp_path / "whole")
    interrupted(tmp_path / "parts", 5, config)
    summary = train_and_evaluate(config, tmp_path / "parts")
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    assert summary.modules[0]["test_accuracy"] is None
    assert summary.modules[1]["test_accuracy"] > 0
    assert "validation/module_0/accuracy" not in records(tmp_path / "parts")[-2]


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, stopped, caplog):
    newest = max((p for p in (stopped / "checkpoints").iterdir()), key=lambda p: int(p.name))
    victim = max(
        (p for p in newest.rglob("*") if p.is_file() and p.parent.name == "d"),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        train_and_evaluate(small_config(), stopped)
    assert f"checkpoint {newest.name} is damaged" in caplog.text
    assert same_run(whole, stopped)
    assert (stopped / "damaged" / newest.name).is_dir()


@pytest.mark.slow
def test_all_checkpoints_damaged_is_one_clear_error(stopped):
    for file in (stopped / "checkpoints").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    before = (stopped / "metrics.jsonl").read_bytes()
    for _ in range(2):  # a second try must not begin from nothing
        with pytest.raises(UserError, match=r"every checkpoint \(\d+(, \d+)*\) is damaged"):
            train_and_evaluate(small_config(), stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert not (stopped / "damaged").exists()
    with pytest.raises(UserError, match="is damaged"):
        load_trained(stopped)


@pytest.mark.slow
def test_a_torn_metrics_line_is_cut_off(whole, stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "epoch": 1.8}\n{"step": 12, "ep')
    train_and_evaluate(small_config(), stopped)
    assert records(whole) == records(stopped)


def test_a_finished_run_answers_without_training(whole, monkeypatch):
    monkeypatch.setattr(train, "make_experiment", lambda settings: pytest.fail("trained again"))
    before = (whole / "summary.json").read_bytes()
    assert train_and_evaluate(small_config(), whole).steps == 12
    assert train_and_evaluate(small_config(train__steps=8), whole).steps == 12
    assert (whole / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_more_steps_extend_a_finished_run(whole, tmp_path):
    train_and_evaluate(small_config(train__steps=8), tmp_path)
    summary = train_and_evaluate(small_config(), tmp_path)
    assert summary.steps == 12
    for a, b in zip(arrays(whole), arrays(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_an_extended_run_is_tested_once(whole, tmp_path):
    train_and_evaluate(small_config(train__steps=6), tmp_path)
    train_and_evaluate(small_config(), tmp_path)
    assert records(whole) == records(tmp_path)


@pytest.mark.slow
def test_extending_a_cosine_says_that_the_schedule_changes(tmp_path, caplog):
    train_and_evaluate(small_config(schedule__name="cosine", train__steps=6), tmp_path)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        train_and_evaluate(small_config(schedule__name="cosine"), tmp_path)
    assert "the cosine now ends at step 12, not 6" in caplog.text


@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        begin = loop.begin

        def signalled(*args):
            signal.raise_signal(signal.SIGTERM)
            return begin(*args)

        patch.setattr(loop, "begin", signalled)
        with pytest.raises(Interrupted, match="stopped at step 0"):
            train_and_evaluate(small_config(), tmp_path)
    assert records(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []
    train_and_evaluate(small_config(), tmp_path)
    assert same_run(whole, tmp_path)


@pytest.mark.slow
def test_without_a_checkpoint_the_configuration_may_change(tmp_path):
    with pytest.raises(UserError, match="diverged"):
        train_and_evaluate(small_config(optimizer__learning_rate=1e25), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())
    assert train_and_evaluate(small_config(train__steps=2), tmp_path).steps == 2


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"cannot write there \(Read-only file system\)"):
        train_and_evaluate(small_config(), tmp_path / "run")


@pytest.mark.slow
def test_backprop_sends_nothing_between_modules(tmp_path):
    with pytest.raises(
        UserError,
        match=r"config\.codec\.name=bf16: config\.method\.name=backprop sends nothing between modules",
    ):
        train_and_evaluate(small_config(engine__name="backprop", codec__name="bf16"), tmp_path)
    summary = train_and_evaluate(small_config(engine__name="backprop", train__steps=1), tmp_path)
    assert summary.raw_bytes_per_image == summary.wire_bytes_per_image == summary.codec_error == []


def test_another_configuration_is_refused_by_name(whole):
    with pytest.raises(
        UserError,
        match=r"config\.model\.width \(was 4, is now 8\); config\.seed \(was 0, is now 1\)",
    ):
        train_and_evaluate(small_config(seed=1, model__width=8), whole)


def test_a_workdir_trains_once_at_a_time(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another training is running there"):
            train_and_evaluate(small_config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


@pytest.mark.slow
def test_divergence_stops_the_run_and_leaves_no_bad_checkpoint(tmp_path):
    config = small_config(optimizer__learning_rate=1e12, checkpoint__every=1, log__every=100)
    with pytest.raises(
        UserError,
        match=r"training diverged: .* module_\d .* step \d+; a smaller config.optimizer.learning_rate",
    ):
        train_and_evaluate(config, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        assert int(path.name) <= 2
    if any((tmp_path / "checkpoints").iterdir()):
        assert all(np.isfinite(a).all() for a in arrays(tmp_path))


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLinesWriter, "write_scalars", no_space)
    with pytest.raises(
        UserError, match="the disk is full; free some space and run the same line again"
    ):
        train_and_evaluate(small_config(), tmp_path)


def test_a_disk_that_fills_up_while_saving_is_one_clear_error(tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async", no_space
    )
    with pytest.raises(
        UserError,
        match="checkpoints: the disk is full; free some space and run the same line again",
    ):
        train_and_evaluate(small_config(), tmp_path)


def test_a_mistake_leaves_no_workdir(tmp_path):
    for fields in ({"model__modules": 9}, {"data__batch_size": 4096}, {"data__image_size": 10}):
        with pytest.raises(UserError):
            train_and_evaluate(small_config(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_init_from_takes_the_weights_and_nothing_else(whole, tmp_path):
    train_and_evaluate(
        small_config(train__steps=1, optimizer__learning_rate=1e-12),
        tmp_path / "new",
        init_from=whole,
    )
    old, new = arrays(whole), arrays(tmp_path / "new")
    assert sum(np.array_equal(a, b) for a, b in zip(old, new, strict=True)) < len(
        old
    )  # counts, momentum, batch statistics
    kernels = [
        (a, b) for a, b in zip(old, new, strict=True) if a.ndim == 4 and np.abs(a - b).max() < 1e-6
    ]
    assert len(kernels) >= 4
    with pytest.raises(
        UserError, match="--init_from: module_0 of that run has parameters of other shapes"
    ):
        train_and_evaluate(small_config(model__width=8), tmp_path / "wider", init_from=whole)
    with pytest.raises(UserError, match=r"--init_from=.*nowhere: holds no run"):
        train_and_evaluate(small_config(), tmp_path / "other", init_from=tmp_path / "nowhere")


def test_what_a_run_writes(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert [m["name"] for m in summary["modules"]] == ["module_0", "module_1"]
    assert (
        summary["raw_bytes_per_image"] == summary["wire_bytes_per_image"] == [4 * 4 * 8 * 4 + 8]
    )  # 8 channels of 4x4, label, id
    assert (summary["wire"], summary["codec_error"]) == ("simulated", [0.0])
    assert (summary["steps"], summary["epochs"], summary["engine"], summary["seed"]) == (
        12,
        2.0,
        "fused",
        0,
    )
    assert summary["versions"]["jax"] == jax.__version__
    steps = [
        (r["step"], sorted(k.split("/")[0] for k in r if "/" in k)[:1]) for r in records(whole)
    ]
    assert steps == [
        (3, ["train"]),
        (6, ["train"]),
        (6, ["validation"]),
        (9, ["train"]),
        (12, ["train"]),
        (12, ["validation"]),
        (12, ["test"]),
    ]
    kept = sorted(int(p.name) for p in (whole / "checkpoints").iterdir())
    assert kept[-2:] == [8, 12]
    assert {p.name for p in (whole / "plots").iterdir()} == {"accuracy.png", "loss.png"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["emptied", "missing", "whole"])
def test_going_on_without_the_records_so_far_is_said(stopped, caplog, what):
    metrics = stopped / "metrics.jsonl"
    {"emptied": lambda: metrics.write_bytes(b""), "missing": metrics.unlink, "whole": lambda: None}[
        what
    ]()
    with caplog.at_level("WARNING", logger="dgl_jax"):
        train_and_evaluate(small_config(), stopped)
    lost = [line for line in caplog.messages if "lost" in line]
    if what == "whole":
        assert lost == []
    else:
        (line,) = lost
        assert line.startswith(f"{metrics}: holds nothing of the steps up to ")
