"""Single rows of the benchmark of an accelerator, and the mistakes in its command line."""

import json
import random
import time
from types import SimpleNamespace

import jax
import pytest
from runs import small_config

from benchmarks.accelerator import accuracy, measuring, modes, report, run, session
from benchmarks.accelerator.rows import SIZES, Job, Skipped
from benchmarks.accelerator.switches import SWITCHES
from benchmarks.interleaved import Timing
from dgl_jax.config import field_names


def job(tmp_path, **changed):
    defaults = {"platform": "cpu", "results": {}, "deadline": time.monotonic() + 570}
    return Job(SIZES["smoke"], tmp_path, "", **defaults | changed)


def test_every_switch_is_a_field():
    assert {name for name, _ in SWITCHES} <= set(field_names())


def test_every_row_of_group_a_trains_a_run_of_its_own(tmp_path, monkeypatch):
    trained = []

    def train(settings, workdir):
        trained.append(workdir)
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text('{"train/module_0/loss": 1.0}\n')
        modules = [{"test_accuracy": 0.5}]
        (workdir / "summary.json").write_text(json.dumps({"modules": modules, "steps": 4}))

    monkeypatch.setattr(modes, "train_and_evaluate", train)
    training = [
        row
        for row in modes.rows(SIZES["smoke"])
        if row.name.startswith(("engine", "codec", "method")) or row.name == "mode train"
    ]
    for row in training:
        row.measure(job(tmp_path))
    assert len(trained) == len(set(trained)) == len(training) > 10


def test_number_of_steps_is_of_whole_dispatches():
    asked = []

    def variant(steps):
        asked.append(steps)
        return Timing(100.0, 1.0)

    size = SimpleNamespace(seconds=0.5, repeats=2)
    assert measuring.timed(size, {"baseline": variant}, 10, at_once=4)["steps"] == 8
    assert asked == [2, 8, 8]  # 5 steps would take the time of a repeat


# Group e


def test_epochs_follow_from_the_rate_of_dgl(tmp_path):
    def figures(method, rate, engine="fused"):
        return {
            "network": "cnn6",
            "method": method,
            "engine": engine,
            "images_per_second": {"median": rate},
        }

    results = {
        "backprop": figures("backprop", 9e9),
        "threads": figures("dgl", 9e9, "threads"),
        "dgl": figures("dgl", 2000.0),
    }
    # 500 s for training; the slowest of four runs makes 15 % of the rate.
    assert accuracy._epochs(job(tmp_path, results=results), 10_000) in (14, 15)
    assert accuracy._epochs(job(tmp_path), 10_000) in (7, 8)  # not measured: 1000 images/s
    late = job(tmp_path, results=results, deadline=time.monotonic() + 5)
    assert accuracy._epochs(late, 10_000) == 1


def test_a_stopped_run_has_its_newest_validation_accuracy(tmp_path):
    with pytest.raises(Skipped, match="before the first evaluation"):
        accuracy._reached(tmp_path)
    lines = [
        {"epoch": 1.0, "validation/module_0/accuracy": 0.2, "validation/module_1/accuracy": 0.3},
        {"epoch": 2.0, "validation/module_0/accuracy": 0.4, "validation/module_1/accuracy": 0.5},
        {"epoch": 2.5, "train/module_0/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert accuracy._reached(tmp_path) == {"epochs": 2.0, "validation_accuracy": 0.5}


def test_compression_counts_all_messages():
    summary = {"raw_bytes_per_image": [300.0, 100.0], "wire_bytes_per_image": [30.0, 20.0]}
    assert accuracy._compression(summary) == 8.0
    assert accuracy._compression({"raw_bytes_per_image": [], "wire_bytes_per_image": []}) is None


def test_without_images_the_rows_say_so(tmp_path):
    for row in accuracy.rows(SIZES["smoke"]):
        with pytest.raises(Skipped, match="no --data_dir"):
            row.measure(job(tmp_path))


# Figures of several rows


def test_derived_figures_equal_those_computed_by_hand():
    def entry(group="c", **figures):
        common = {"library": "x", "network": "n", "batch_size": 8, "dtype": "bfloat16"}
        return {"group": group, "figures": common | figures}

    def peer(method, rate, **figures):
        about = {"library": "PyTorch 2", "method": method, "body_flops": 4e9, "head_flops": 1e9}
        times = {"tick_milliseconds": {"median": 8e3 / rate}, "images_per_second": {"median": rate}}
        return entry(**about | times | figures)

    rows = {
        "rate": {"group": "c", "figures": {"dtype": "bfloat16", "flops_per_second": 1e12}},
        "dgl": entry(
            method="dgl",
            body_flops=4e9,
            head_flops=1e9,
            tick_milliseconds={"median": 30.0},
            images_per_second={"median": 267.0},
        ),
        "backprop": entry(
            method="backprop",
            body_flops=4e9,
            head_flops=0.0,
            tick_milliseconds={"median": 99.0},  # at another time, when the machine was slower
            over_baseline={"median": 2.5},
            images_per_second={"median": 81.0},
        ),
        "eager": peer("dgl", 150.0),
        "compiled": peer("dgl", 178.0),
        "other batch": peer("dgl", 999.0, batch_size=16),
        "missing": {"group": "c", "reason": "no PyTorch"},
    }
    report.derive(rows)
    assert rows["dgl"]["figures"]["percent_of_matrix_rate"] == 50.0
    assert rows["dgl"]["figures"]["over_backprop"] == 2.5
    assert rows["dgl"]["figures"]["bound"] == 1.625
    assert "over_backprop" not in rows["backprop"]["figures"]
    assert rows["dgl"]["figures"]["over_pytorch"] == 1.5
    assert "over_pytorch" not in rows["backprop"]["figures"] | rows["compiled"]["figures"]
    del rows["backprop"]["figures"]["over_baseline"]
    report.derive(rows)
    assert rows["dgl"]["figures"]["over_backprop"] == 0.303


# Memory


def test_memory_of_a_process_that_compiled_is_not_reported(monkeypatch):
    settings = small_config()
    monkeypatch.setattr(measuring, "training", lambda experiment, warm_up: lambda steps: None)
    monkeypatch.setattr(measuring.system, "peak_memory", lambda devices: {"gpu:0": 1234})
    monkeypatch.setattr(measuring, "described", lambda experiment: {})
    assert measuring.peak(settings) == {"peak_memory_bytes": 1234}

    def compiling(experiment, warm_up):
        number = random.random()  # a program that no earlier session has stored
        return lambda steps: jax.jit(lambda x: x * number + steps)(1.0)

    monkeypatch.setattr(measuring, "training", compiling)
    with pytest.raises(Skipped, match=r"^1 programs were compiled here"):
        measuring.peak(settings)


# Command line


def test_workers_import_the_chosen_groups_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "serve", lambda rows, *_: asked.extend(rows("smoke")))
    run.main(["--worker", "--only=c,d"])
    assert {row.group for row in asked} == {"c", "d"}
    runner = session.Session("script", "smoke", tmp_path, tmp_path / "log", "", ("--only=c",))
    started = []

    def worker(command, log, variables):
        started.append(command[1:])
        raise ChildProcessError("ended")

    monkeypatch.setattr(session, "Worker", worker)
    with pytest.raises(ChildProcessError):
        runner.environment(1.0)
    assert started == [["script", "--worker", "--only=c"]]


def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, words in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "a.log", "use .json"),
        (tmp_path / "file" / "a.json", "cannot write there"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.arguments([f"--output={output}"])
        assert f"--output={output}: " in capsys.readouterr().err.splitlines()[-1]
        assert words in session.unwritable(output)
    assert session.unwritable(tmp_path / "new" / "a.json") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_machine_without_devices_ends_the_command(tmp_path, monkeypatch):
    flags = ["--minutes=1", f"--output={tmp_path / 'a.json'}"]
    monkeypatch.setattr(
        session.Session, "environment", lambda self, limit: session.Answer({}, "no answer")
    )
    with pytest.raises(SystemExit, match=r"^no devices: no answer; --size measures"):
        run.main(flags)
    assert not json.loads((tmp_path / "a.json").read_text())["finished"]


@pytest.mark.medium
def test_names_without_a_row_end_the_command(tmp_path):
    flags = ["--minutes=4", "--only=d", "--rows=typo", f"--output={tmp_path / 'a.json'}"]
    with pytest.raises(SystemExit, match=r"no row of the groups d has a name like \['typo'\]"):
        run.main(flags)
