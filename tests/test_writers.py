"""Metric writers and readers, also after a killed process, and the progress display."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from dgl_jax.errors import UserError
from dgl_jax.run.progress import Progress, status
from dgl_jax.run.writers import (
    JsonLinesWriter,
    MultiWriter,
    TensorBoardWriter,
    read_jsonl,
    truncate,
    write_stdout,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with contextlib.closing(JsonLinesWriter(path, clock=lambda: 1700000000.5)) as writer:
        for step in (10, 20, 20, 30):
            writer.write_scalars(step, {"train/module_0/loss": 1 / step}, epoch=step / 10)
    return path


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_records_are_read_as_written(path):
    records = read_jsonl(path)
    assert [record["step"] for record in records] == [10, 20, 20, 30]
    assert list(records[0]) == ["step", "epoch", "time", "train/module_0/loss"]
    assert records[3] == {
        "step": 30,
        "epoch": 3.0,
        "time": 1700000000.5,
        "train/module_0/loss": 1 / 30,
    }


def test_epoch_and_values_may_be_array_scalars(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write_scalars(np.int64(3), {"epoch": np.float32(0.5), "learning_rate": np.float32(0.25)})
    writer.write_scalars(4, {"learning_rate": 1})
    first, second = read_jsonl(path)  # every line is flushed while the writer is open
    assert (first["step"], first["epoch"], first["learning_rate"]) == (3, 0.5, 0.25)
    assert second["epoch"] is None
    writer.close()
    writer.close()


def test_nonfinite_values_are_null_in_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(JsonLinesWriter(path)) as writer:
        writer.write_scalars(
            1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2.0}, epoch=math.nan
        )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert [record[key] for key in ("a", "b", "c", "d", "epoch")] == [None, None, None, 2.0, None]


@pytest.mark.parametrize(
    ("step", "remaining"), [(0, []), (19, [10]), (20, [10, 20, 20]), (99, [10, 20, 20, 30])]
)
def test_truncate_keeps_records_up_to_the_step_unchanged(path, step, remaining):
    lines = path.read_bytes().splitlines(keepends=True)
    assert truncate(path, step) == len(lines) - len(remaining)
    assert path.read_bytes() == b"".join(lines[: len(remaining)])
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_truncate_of_a_missing_file_creates_nothing(tmp_path):
    assert truncate(tmp_path / "metrics.jsonl", 5) == 0
    assert not list(tmp_path.iterdir())


def test_failed_truncation_leaves_the_file_unchanged(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        truncate(path, 10)
    assert path.read_bytes() == before


def test_incomplete_last_line_is_dropped(path):
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [record["step"] for record in read_jsonl(path)] == [10, 20, 20]
    truncate(path, 100)
    assert path.read_bytes() == whole[:start]
    path.write_bytes(whole[:-1])  # only the newline is missing: the record is complete
    assert truncate(path, 100) == 0
    assert path.read_bytes() == whole


def test_writer_continues_after_an_incomplete_line(path):
    path.write_bytes(path.read_bytes()[:-9])
    with contextlib.closing(JsonLinesWriter(path)) as writer:
        writer.write_scalars(40, {})
    assert [record["step"] for record in read_jsonl(path)] == [10, 20, 20, 40]


def test_damaged_line_in_the_middle_is_an_error_with_its_number(path):
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:-4]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)


def read_events(directory):
    """Returns (step, tag, value) of all event files.

    A record consists of the length of the event (8 bytes), a CRC (4), the event, and a CRC (4).
    """
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            events += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                events.append((event.step, "restart", event.session_log.status))
    return events


def test_tensorboard_events_are_read_as_written(tmp_path):
    with contextlib.closing(TensorBoardWriter(tmp_path)) as writer:
        writer.write_scalars(5, {"train/module_0/loss": 0.5, "learning_rate": 0.25}, epoch=1.5)
    assert read_events(tmp_path) == [
        (5, "train/module_0/loss", 0.5),
        (5, "learning_rate", 0.25),
        (5, "epoch", 1.5),
    ]


def test_tensorboard_hides_events_after_the_checkpoint(tmp_path):
    TensorBoardWriter(tmp_path, resumed_at=20).close()
    # Status 1 is START: TensorBoard drops older events from step 21 on.
    assert read_events(tmp_path) == [(21, "restart", 1)]


def test_tensorboard_hides_all_events_of_an_attempt_without_a_checkpoint(tmp_path):
    TensorBoardWriter(tmp_path, resumed_at=0).close()
    assert read_events(tmp_path) == [(0, "restart", 1)]


def test_tensorboard_metrics_of_an_earlier_end_are_removed(tmp_path):
    for end in (4, 6):
        with contextlib.closing(TensorBoardWriter(tmp_path)) as writer:
            writer.write_scalars(end, {"train/module_0/loss": 0.5})
            for step in (2, end):
                writer.write_scalars(step, {"final/module_1/mmd": step / 8}, epoch=1.0)
    assert read_events(tmp_path / "final") == [
        (2, "final/module_1/mmd", 0.25),
        (2, "epoch", 1.0),
        (6, "final/module_1/mmd", 0.75),
        (6, "epoch", 1.0),
    ]
    assert not any(tag.startswith("final/") for _, tag, _ in read_events(tmp_path))


def test_importing_writers_loads_no_heavy_library():
    code = (
        "import sys, dgl_jax.run.writers; "
        "print([m for m in ('tensorboardX', 'matplotlib', 'orbax') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_multi_writer_closes_all_writers_even_if_one_fails(tmp_path):
    class Failing(JsonLinesWriter):
        def close(self):
            super().close()
            raise OSError("no space")

    paths = [tmp_path / name for name in "abc"]
    parts = [JsonLinesWriter(paths[0]), Failing(paths[1]), JsonLinesWriter(paths[2])]
    writer = MultiWriter(parts)
    writer.write_scalars(1, {"x": 2.0}, epoch=0.5)
    with pytest.raises(OSError, match="no space"):
        writer.close()
    for path, part in zip(paths, parts):
        assert [(r["step"], r["epoch"], r["x"]) for r in read_jsonl(path)] == [(1, 0.5, 2.0)]
        with pytest.raises(ValueError, match="closed"):
            part.write_scalars(2, {})
    MultiWriter([]).write_scalars(1, {"x": 1.0})


def test_status_orders_modules_by_number_and_omits_missing_heads():
    scalars = {f"train/module_{k}/accuracy": k / 100 for k in (10, 9, 2)}
    scalars |= {
        "validation/ensemble/accuracy": 0.956,
        "validation/module_1/accuracy": 0.9,
        "images_per_second": 1234.4,
    }
    assert status(scalars) == {
        "train": "train 0.02 0.09 0.10",
        "validation": "val 0.90 (ensemble 0.96)",
        "speed": "1,234 images/s",
    }
    assert status({"learning_rate": 0.1, "time": 1.0}) == {}


def test_status_shows_losses_where_there_is_no_accuracy():
    losses = {"train/module_0/loss": 1.0, "train/module_1/loss": 0.5, "test/module_0/loss": 2.0}
    accuracy = {"test/module_1/accuracy": 0.25, "test/module_1/loss": 3.0}
    assert status(losses | accuracy) == {"train": "train loss 1.00 0.50", "test": "test 0.25"}


def test_status_shows_a_dash_for_a_module_without_an_update():
    rates = {f"work/module_{k}/updates_per_second": float(k) for k in range(4)}
    assert status({"train/module_1/accuracy": 0.25, "train/module_2/accuracy": 0.5} | rates) == {
        "train": "train - 0.25 0.50 -",
        "rate": "0.0 1.0 2.0 3.0 updates/s",
    }
    ages = {f"replay/module_{k}/age": 1.0 for k in (1, 2)}
    assert status({"train/module_2/accuracy": 0.5} | ages)["train"] == "train - - 0.50"
    # There is no dash for heads that are never trained, nor in evaluations.
    assert status({"train/module_1/accuracy": 0.25}) == {"train": "train 0.25"}
    assert status({"test/module_1/accuracy": 0.25} | rates)["test"] == "test 0.25"


def test_status_of_a_probe():
    probe = {f"diagnostics/module_{k}/gradient_squared": 10.0 ** (1 - k) for k in (2, 0, 1)}
    probe |= {"diagnostics/module_1/mmd": 0.125, "diagnostics/module_1/wasserstein": 3.0}
    assert status(probe) == {"gradient": "squared gradient 10 1 0.1", "drift": "drift - 0.12"}
    late = {"work/module_0/updates_per_second": 5.0, "work/module_2/updates_per_second": 7.0}
    assert status(late | {"replay/module_1/age": 0.5}) == {
        "age": "age - 0.5",
        "rate": "5.0 - 7.0 updates/s",
    }


def test_eta_counts_only_steps_of_this_process():
    clock = Clock()
    progress = Progress(Console(file=io.StringIO(), force_terminal=False), clock)
    progress.start(1000, done=600)
    assert progress.eta() is None
    clock.now += 50  # includes the compilation
    progress.update(610, {})
    assert progress.eta() is None
    for step in (620, 630, 640):
        clock.now += 2
        progress.update(step, {})
    progress.update(640, {"validation/module_0/accuracy": 0.5})  # an evaluation at the same step
    assert progress.eta() == pytest.approx(360 * 2 / 10)
    clock.now += 7
    assert progress.eta() == pytest.approx(360 * 2 / 10 - 7)  # counts down between updates
    progress.update(1000, {})
    assert progress.eta() == 0


def test_progress_without_a_terminal_logs_one_line_per_update(caplog):
    clock, out = Clock(), io.StringIO()
    with (
        caplog.at_level("INFO", logger="dgl_jax.run.progress"),
        Progress(Console(file=out, force_terminal=False), clock) as progress,
    ):
        progress.start(200, 0)
        progress.message("100% of [bold]it[/bold]")
        clock.now += 60
        progress.update(50, {})
        clock.now += 30
        progress.update(
            100, {"epoch": 1.5, "train/module_0/accuracy": 0.91, "images_per_second": 1000}
        )
        progress.update(100, {"validation/module_0/accuracy": 0.9})
    assert [record.getMessage() for record in caplog.records] == [
        "100% of [bold]it[/bold]",
        "step 50/200 | ETA -",
        "step 100/200 | epoch 1.50 | train 0.91 | 1,000 images/s | ETA 0:01:00",
        "step 100/200 | val 0.90 | ETA 0:01:00",
    ]
    assert out.getvalue() == ""


@pytest.mark.parametrize("modules", [1, 2, 10])
def test_progress_on_a_terminal_shows_accuracies_and_eta(modules):
    clock, out = Clock(), io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=80), clock) as progress:
        progress.start(200, done=50)
        clock.now += 60
        progress.update(75, {})
        clock.now += 15
        progress.update(
            100, {f"validation/module_{k}/accuracy": 0.9 + k / 100 for k in range(modules)}
        )
        progress.update(100, {f"train/module_{k}/accuracy": 0.8 + k / 100 for k in range(modules)})
        progress.message("saved [100]")
    shown = out.getvalue()
    assert "100/200 ETA 0:01:00" in shown
    assert "saved [100]" in shown
    text = " ".join(shown.split())  # ten modules take two lines
    assert f"train {' '.join(f'{0.8 + k / 100:.2f}' for k in range(modules))} | val 0.90" in text
    progress.close()


def test_closed_standard_output_is_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    write_stdout("text")
    read, write = os.pipe()
    os.close(read)  # the reader has ended
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        write_stdout("text")
        write_stdout("more")
