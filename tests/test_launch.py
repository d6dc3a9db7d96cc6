"""Tests of the command line, run as a user would run it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import FIELDS, arrays, records
from safetensors.numpy import load_file
from written_runs import write_run

from dgl_jax import system

ROOT = Path(__file__).parent.parent
SMALL = [
    "--config=configs/digits.py",
    *(f"--config.{name}={value}" for name, value in FIELDS.items()),
]


def launch(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Runs launch.py until it ends, with `options` of `subprocess.run`."""
    command = [sys.executable, "launch.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )


def fails(*arguments: str) -> str:
    """Returns the error line of a call that must end with status 2 and print no other line."""
    process = launch(*arguments)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Returns the workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("run")
    process = launch(*SMALL, f"--workdir={workdir}")
    assert process.returncode == 0, process.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    accuracies = [module["test_accuracy"] for module in summary["modules"]]
    assert json.loads(process.stdout) == {
        "modules": accuracies,
        "ensemble": summary["ensemble_accuracy"],
    }
    assert all(0 < accuracy < 1 for accuracy in accuracies)
    return workdir


def exported(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the parameters of a run, as `--mode=export` writes them."""
    process = launch("--mode=export", f"--workdir={workdir}")
    assert process.returncode == 0, process.stderr
    return load_file(Path(process.stdout.strip()) / "model.safetensors")


def stop(workdir: Path, signum: int) -> int:
    """Starts the run, sends the signal once its log shows step 6, and returns the exit status."""
    command = [sys.executable, "launch.py", *SMALL, f"--workdir={workdir}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "step 6/12" in line:
                process.send_signal(signum)
                break
        process.stderr.read()
        return process.wait(300)


@pytest.mark.slow
def test_resumed_run_after_sigkill_ends_with_the_same_bits(trained, tmp_path):
    assert stop(tmp_path, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    process = launch(*SMALL, f"--workdir={tmp_path}")
    assert process.returncode == 0, process.stderr
    whole, parts = exported(trained), exported(tmp_path)
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert records(trained) == records(tmp_path)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_first(tmp_path):
    assert stop(tmp_path, signal.SIGTERM) == 128 + signal.SIGTERM
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert newest >= 6


@pytest.mark.medium
def test_report_opens_no_device(tmp_path):
    run = write_run(tmp_path / "runs" / "a", [0.5, 0.6], 0.6)
    # An accelerator that does not exist: JAX fails when somebody asks it for devices.
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}
    report = ["--mode=report", f"--workdir={run.parent}"]
    process = launch(*report, env=environment)
    assert process.stderr == ""
    assert process.stdout.split() == [str(run.parent / f"report.{end}") for end in ("html", "md")]
    assert "--output=x.pdf: must end in .html" in fails(*report, "--output=x.pdf")
    assert "no such folder" in fails("--mode=report", f"--workdir={run / 'none'}")


@pytest.mark.slow
def test_eval_predict_and_plot_need_no_config(trained, tmp_path):
    summary = json.loads((trained / "summary.json").read_text())
    metrics = json.loads(launch("--mode=eval", f"--workdir={trained}").stdout)
    assert metrics["test/module_1/accuracy"] == summary["modules"][1]["test_accuracy"]
    assert metrics["test/ensemble/accuracy"] == summary["ensemble_accuracy"]

    for name in ("a", "b"):
        Image.fromarray(np.full((20, 20, 3), 80, np.uint8)).save(tmp_path / f"{name}.png")
    table = launch(
        "--mode=predict", f"--workdir={trained}", f"--images={tmp_path}"
    ).stdout.splitlines()
    assert table[0] == "image,label,probability,ensemble_label,ensemble_probability"
    assert [row.split(",")[0] for row in table[1:]] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]
    assert table[1].split(",")[1].startswith("pattern_")
    assert table[1].split(",")[1:] == table[2].split(",")[1:]
    assert (
        launch(
            "--mode=predict",
            f"--workdir={trained}",
            f"--images={tmp_path}",
            f"--output={tmp_path / 'p.jsonl'}",
        ).returncode
        == 0
    )
    assert (
        json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])["label"]
        == table[1].split(",")[1]
    )

    usual = max(16, system.cpu_count())
    many = usual // 2 + 1
    env = {name: value for name, value in os.environ.items() if name != "NPROC"}
    plot_process = launch("--mode=plot", f"--workdir={trained}", f"--cpu_devices={many}", env=env)
    assert [Path(p).name for p in plot_process.stdout.split()] == ["accuracy.png", "loss.png"]
    assert (
        f"{many} CPU devices: uses {2 * many} threads instead of the {usual} "
        f"for up to {usual // 2} devices" in plot_process.stderr
    )


@pytest.mark.slow
def test_eval_accepts_overrides_of_fields_that_may_change(trained, tmp_path):
    overridden = launch("--mode=eval", f"--workdir={trained}", "--config.eval.every=3")
    assert overridden.returncode == 0, overridden.stderr
    assert overridden.stdout == launch("--mode=eval", f"--workdir={trained}").stdout
    assert "config.seed (was 0, is now 1)" in fails(
        "--mode=eval", f"--workdir={trained}", "--config.seed=1"
    )


@pytest.mark.full_compile
@pytest.mark.slow
def test_fused_and_pipeline_commands_end_with_the_same_bits(tmp_path):
    fields = {
        "data.batch_size": 64,
        "data.train_examples": 640,
        "model.width": 24,
        "model.modules": 3,
        "train.steps": 5,
    }
    fields |= {"checkpoint.every": 5, "eval.every": 5}
    line = [*SMALL, *(f"--config.{name}={value}" for name, value in fields.items())]
    env = {name: value for name, value in os.environ.items() if name != "NPROC"}
    for name, more in (
        ("fused", ()),
        ("pipeline", ("--config.engine.name=pipeline", "--cpu_devices=3")),
    ):
        process = launch(*line, f"--workdir={tmp_path / name}", *more, env=env)
        assert process.returncode == 0, process.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["cpu_threads"] == max(16, system.cpu_count())
        assert f" ({summary['cpu_threads']} threads)" in process.stderr
    assert [m["devices"] for m in summary["modules"]] == [[0], [1], [2]]
    pairs = list(zip(arrays(tmp_path / "fused"), arrays(tmp_path / "pipeline"), strict=True))
    assert len(pairs) > 50
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_bench_prints_one_json_line():
    process = launch(
        *SMALL,
        "--mode=bench",
        "--bench_steps=4",
        "--config.engine.name=pipeline",
        "--cpu_devices=2",
    )
    assert process.returncode == 0, process.stderr
    (line,) = process.stdout.splitlines()
    result = json.loads(line)
    assert result["engine"] == "pipeline"
    assert len(result["module_milliseconds"]) == 2
    assert result["cpu_threads"] == int(os.environ["NPROC"]), (
        "NPROC of the user must take precedence"
    )
    assert result["peak_memory_bytes"]["process"] > 0
    assert all(
        result[key] > 0
        for key in ("images_per_second", "tick_milliseconds", "python_milliseconds_per_tick")
    )


@pytest.mark.slow
def test_user_errors_are_one_line(tmp_path):
    run = f"--workdir={tmp_path / 'run'}"
    assert (
        "config.optimizer.learning_rat: no such field; did you mean optimizer.learning_rate"
        in fails(*SMALL, run, "--config.optimizer.learning_rat=1")
    )
    assert "config.engine.name='pipelin': no such name; did you mean pipeline" in fails(
        *SMALL, run, "--config.engine.name=pipelin"
    )
    unused = (
        "config.engine.slowdown=(2.0, 1.0): "
        "applies to config.engine.name=simulated or threads, not to fused"
    )
    assert unused in fails(*SMALL, run, "--config.engine.slowdown=2,1")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    assert f"--config: ZeroDivisionError: division by zero ({broken}:2)" in fails(
        f"--config={broken}", run
    )
    broken.write_text("def get_config():\n    return int('x')\n")  # absl wraps errors of values
    assert (
        fails(f"--config={broken}", run)
        .rstrip()
        .endswith(
            f"error: --config: ValueError: invalid literal for int() with base 10: 'x' ({broken}:2)"
        )
    )
    flags = tmp_path / "flags"
    flags.write_text("--config=digits\n--config.codec.nam=vq\n")
    assert "config.codec.nam: no such field" in fails(f"--flagfile={flags}", run)
    assert "error: Unable to open flagfile: " in fails(f"--flagfile={tmp_path}/missing", run)
    assert "--config: " in fails(f"--config={tmp_path}", run)
    assert "stray: not a flag" in fails(*SMALL, run, "stray")
    assert "--jobs: applies to --mode=sweep, not to --mode=train" in fails(*SMALL, run, "--jobs=2")
    assert "'abc'" in fails(*SMALL, run, "--config.optimizer.learning_rate=abc")
    missing = fails("--config=configs/digit.py", run)
    assert "configs/digit.py: no such file; configs has cifar10.py, " in missing
    assert " digits.py" in missing
    assert "--workdir is missing" in fails(*SMALL)
    assert "--config is missing" in fails(run)
    assert "--config.seed=1: which configuration?" in fails(run, "--config.seed=1")
    assert "Unknown command line flag 'wrkdir'" in fails(*SMALL, "--wrkdir=x")
    assert "holds no run" in fails("--mode=eval", run)
    assert "no such directory" in fails(
        "--config=configs/cifar10.py", run, f"--config.data.dir={tmp_path / 'nowhere'}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_missing_checkpoint_is_one_line(trained):
    assert "--checkpoint=7: no such checkpoint; use newest, best, " in fails(
        "--mode=eval", f"--workdir={trained}", "--checkpoint=7"
    )


def test_help_lists_the_modes():
    process = launch("--help", env=os.environ | {"COLUMNS": "200"})
    assert "<train|eval|predict|export|plot|bench|plan|sweep|report>" in process.stdout


def test_launch_script_stays_short():
    assert len((ROOT / "launch.py").read_text().splitlines()) < 100


@pytest.mark.slow
def test_plan_needs_no_data_set(tmp_path):
    small = [argument for argument in SMALL if "data.name" not in argument]
    stated = [
        "--block_times=1,2,3,4",
        "--bandwidth=1",
        f"--workdir={tmp_path}",
        f"--config.data.dir={tmp_path / 'nowhere'}",
    ]
    process = launch(
        *small,
        "--config.data.name=cifar10",
        "--mode=plan",
        "--json",
        *stated,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    plan = json.loads(process.stdout)
    assert [module["body_parameters"] for module in plan["modules"]] == [
        4 * 27 + 12 + 8 * 36 + 24,
        8 * 72 + 24 + 16 * 72 + 48,
    ]
    assert plan["timeline"] == str(tmp_path / "plots" / "plan.png")
    assert (tmp_path / "plots" / "plan.png").exists()
    assert not (tmp_path / ".cache" / "dgl_jax").exists()  # where data sets are prepared
    assert "--bandwidth=-1.0: a number above 0" in fails(
        *small, "--mode=plan", *stated, "--bandwidth=-1"
    )
