"""Interrupting and resuming runs with synchronous engines, bit for bit, and errors in workdirs."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import arrays, records, same_run, small_config

from dgl_jax import system, train
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
from dgl_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Returns the workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    train_and_evaluate(small_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped_at_5(tmp_path_factory) -> Path:
    """Returns the workdir of a run that a signal stopped at step 5; tests use copies of it."""
    workdir = tmp_path_factory.mktemp("stopped")
    interrupted(workdir, 5)
    return workdir


@pytest.fixture
def stopped(stopped_at_5, tmp_path) -> Path:
    """Returns a copy of the workdir of a run that was stopped at step 5."""
    return Path(shutil.copytree(stopped_at_5, tmp_path / "stopped"))


def interrupt_at(step: int, monkeypatch, signum: int = signal.SIGTERM) -> None:
    """Raises the signal when the report of `step` arrives."""
    add, raised = Window.add, []

    def add_and_raise(self, report):
        add(self, report)
        if report.updates[-1] >= step and not raised:
            raised.append(True)
            signal.raise_signal(signum)

    monkeypatch.setattr(Window, "add", add_and_raise)


def interrupted(workdir: Path, step: int, config=None, signum: int = signal.SIGTERM) -> int:
    """Trains until a signal at `step`; returns the step of the checkpoint that remains."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch, signum)
        with pytest.raises(Interrupted) as stopped:
            train_and_evaluate(config or small_config(), workdir)
    assert stopped.value.signum == signum
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("place", [(Evaluator, "evaluate"), (Due, "next_event")])
def test_signal_between_steps_is_followed_by_a_checkpoint(place, tmp_path, monkeypatch):
    # At step 6 an evaluation is due but no checkpoint. The signal arrives during the evaluation, or
    # just before the next steps.
    function, calls = getattr(*place), []

    def signaled(*args):
        calls.append(args)
        if (
            len(calls) == {"evaluate": 1, "next_event": 3}[place[1]]
        ):  # periods end at steps 4, 6 and 8
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(*place, signaled)
    with pytest.raises(Interrupted):
        train_and_evaluate(small_config(), tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "step"), [(signal.SIGTERM, 5), (signal.SIGINT, 7)])
def test_resumed_run_equals_uninterrupted_run(whole, tmp_path, signum, step):
    saved = interrupted(tmp_path, step, signum=signum)
    assert step <= saved < step + 4  # batches in flight are finished, nothing more
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
def test_run_resumes_with_another_engine_and_other_devices(whole, stopped):
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
def test_fused_resumes_a_pipeline_checkpoint_bit_for_bit(tmp_path):
    one_device_each = {"engine__group_sizes": (1, 1)}
    train_and_evaluate(
        small_config(engine__name="pipeline", **one_device_each), tmp_path / "pipeline"
    )
    interrupted(tmp_path / "both", 5, small_config(engine__name="pipeline", **one_device_each))
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
def test_damaged_checkpoint_falls_back_to_the_previous_one(whole, stopped, caplog):
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
def test_all_checkpoints_damaged_is_a_one_line_error(stopped):
    for file in (stopped / "checkpoints").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    before = (stopped / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the second attempt must not start from scratch
        with pytest.raises(UserError, match=r"every checkpoint \(\d+(, \d+)*\) is damaged"):
            train_and_evaluate(small_config(), stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert not (stopped / "damaged").exists()
    with pytest.raises(UserError, match="is damaged"):
        load_trained(stopped)


@pytest.mark.slow
def test_incomplete_metrics_line_is_removed(whole, stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "epoch": 1.8}\n{"step": 12, "ep')
    train_and_evaluate(small_config(), stopped)
    assert records(whole) == records(stopped)


@pytest.mark.medium
def test_finished_run_is_not_trained_again(whole, monkeypatch):
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
def test_extended_run_has_one_test_record(whole, tmp_path):
    train_and_evaluate(small_config(train__steps=6), tmp_path)
    train_and_evaluate(small_config(), tmp_path)
    assert records(whole) == records(tmp_path)


@pytest.mark.slow
def test_another_length_and_thread_count_warn(tmp_path, caplog, monkeypatch):
    train_and_evaluate(small_config(schedule__name="cosine", train__steps=6), tmp_path)
    usual = system.cpu_threads()
    assert "threads after" not in caplog.text
    monkeypatch.setattr(system, "cpu_threads", lambda: 5)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        train_and_evaluate(small_config(schedule__name="cosine"), tmp_path)
    assert "the cosine schedule now ends at step 12, not 6" in caplog.text
    assert f"5 threads after {usual}: results are rounded differently" in caplog.text


@pytest.mark.slow
def test_signal_before_the_first_step_leaves_no_checkpoint(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        begin = loop.begin

        def signaled(*args):
            signal.raise_signal(signal.SIGTERM)
            return begin(*args)

        patch.setattr(loop, "begin", signaled)
        with pytest.raises(Interrupted, match="stopped at step 0"):
            train_and_evaluate(small_config(), tmp_path)
    assert records(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []
    train_and_evaluate(small_config(), tmp_path)
    assert same_run(whole, tmp_path)


@pytest.mark.medium
def test_changed_configuration_is_refused_with_the_fields(whole):
    with pytest.raises(
        UserError,
        match=r"config\.model\.width \(was 4, is now 8\); config\.seed \(was 0, is now 1\)",
    ):
        train_and_evaluate(small_config(seed=1, model__width=8), whole)


@pytest.mark.slow
def test_init_from_takes_the_weights_and_nothing_else(whole, tmp_path):
    train_and_evaluate(
        small_config(train__steps=1, optimizer__learning_rate=1e-12),
        tmp_path / "new",
        init_from=whole,
    )
    old, new = arrays(whole), arrays(tmp_path / "new")
    # Counts, momentum and batch statistics differ.
    assert sum(np.array_equal(a, b) for a, b in zip(old, new, strict=True)) < len(old)
    kernels = [
        (a, b) for a, b in zip(old, new, strict=True) if a.ndim == 4 and np.abs(a - b).max() < 1e-6
    ]
    assert len(kernels) == 2  # one per block
    with pytest.raises(
        UserError, match="--init_from: module_0 of that run has parameters of other shapes"
    ):
        train_and_evaluate(small_config(model__width=8), tmp_path / "wider", init_from=whole)
    with pytest.raises(UserError, match=r"config\.method\.name is dgl there and backprop here$"):
        train_and_evaluate(
            small_config(method__name="backprop"), tmp_path / "headless", init_from=whole
        )
    with pytest.raises(UserError, match=r"--init_from=.*nowhere: holds no run"):
        train_and_evaluate(small_config(), tmp_path / "other", init_from=tmp_path / "nowhere")


@pytest.mark.medium
def test_files_of_a_finished_run(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert [m["name"] for m in summary["modules"]] == ["module_0", "module_1"]
    bytes_per_image = [8 * 8 * 4 * 4 + 8]  # 4 channels of 8x8, label, id
    assert summary["raw_bytes_per_image"] == summary["wire_bytes_per_image"] == bytes_per_image
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
    saved = sorted(int(p.name) for p in (whole / "checkpoints").iterdir())
    assert saved[-2:] == [8, 12]
    assert {p.name for p in (whole / "plots").iterdir()} == {"accuracy.png", "loss.png"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["empty", "missing", "without the first", "complete"])
def test_resuming_without_all_metrics_so_far_warns(stopped, caplog, part):
    metrics = stopped / "metrics.jsonl"
    step = max(int(path.name) for path in (stopped / "checkpoints").iterdir())
    lines = metrics.read_bytes().splitlines(keepends=True)
    if part == "empty":
        metrics.write_bytes(b"")
    elif part == "missing":
        metrics.unlink()
    elif part == "without the first":
        metrics.write_bytes(b"".join(lines[1:]))
    with caplog.at_level("WARNING", logger="dgl_jax"):
        train_and_evaluate(small_config(), stopped)
    lost = [line for line in caplog.messages if "lost" in line]
    if part == "complete":
        assert lost == []
    else:
        count = 1 if part == "without the first" else len(lines)
        assert lost == [
            f"{metrics}: {count} of {len(lines)} records of the steps up to {step} are missing and "
            "lost; training continues"
        ]
