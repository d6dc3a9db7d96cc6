"""Tests of the one-line errors for failing devices, and of resuming after such errors."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import small_config

from dgl_jax import errors, system, train
from dgl_jax.config import make_settings
from dgl_jax.engines import FusedEngine
from dgl_jax.errors import UserError, explain, not_opened, out_of_memory, readable, reported
from dgl_jax.run import workdir
from dgl_jax.run.build import make_experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.restore import load_trained
from dgl_jax.system import DeviceMemory
from dgl_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
FREE = "3.0 GiB of 79.0 GiB free on cuda:1"
HELP = (
    "; a smaller config.data.batch_size, a larger config.train.accumulate or "
    "config.model.remat=True needs less"
)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that 3 of 79 GiB are free on the fullest device."""
    monkeypatch.setattr(
        system, "fullest_device", lambda: ("cuda:1", DeviceMemory(3 * 2**30, 79 * 2**30))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Out of memory while trying to allocate 17179869184 bytes.",
            f"16.0 GiB asked for, {FREE}",
        ),
        ("Out of memory while trying to allocate 16.00GiB.", f"16.0 GiB asked for, {FREE}"),
        ("Out of memory allocating 3072 bytes.", f"3.0 KiB asked for, {FREE}"),
        (
            "Failed to allocate request for 2.50GiB (2684354560B) on device ordinal 0",
            f"2.5 GiB asked for, {FREE}",
        ),
        (
            "Attempting to allocate 2.00G. That was not possible. There are 1.20G free.; "
            "(0x0x0_HBM0)",
            "2.0 GiB asked for, 1.2 GiB free",
        ),
        (
            "Ran out of memory in memory space hbm. Used 18.22G of 15.48G hbm. "
            "Exceeded hbm capacity by 2.74G.",
            "18.2 GiB asked for, the device has 15.5 GiB",
        ),
        ("Attempting to reserve 500.00M at the bottom of memory.", f"500.0 MiB asked for, {FREE}"),
        ("Scratch is used up.\nmore", f"RESOURCE_EXHAUSTED: Scratch is used up.; {FREE}"),
    ],
)
def test_out_of_memory_reports_requested_and_free_bytes(gpu, text, message):
    assert (
        explain(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}"))
        == f"out of memory ({message}){HELP}"
    )


def test_out_of_memory_without_known_free_bytes(monkeypatch):
    monkeypatch.setattr(system, "fullest_device", lambda: None)
    monkeypatch.setattr(system, "free_memory", lambda: None)
    message = out_of_memory(RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"))
    assert message == f"out of memory (INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory){HELP}"
    assert (
        out_of_memory(MemoryError("Unable to allocate 16.0 GiB for an array"))
        == f"out of memory (16.0 GiB asked for){HELP}"
    )
    assert out_of_memory(RuntimeError("Out of luck")) is None


def test_out_of_memory_on_cpu_and_in_numpy():
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros((2**44,), jnp.float32).block_until_ready()
    assert explain(error.value).startswith("out of memory (64.0 TiB asked for, ")
    assert f"iB free on cpu:{min(d.id for d in jax.local_devices())})" in explain(error.value)
    with pytest.raises(MemoryError) as error:
        np.zeros((2**60,), np.uint8)
    assert explain(error.value).startswith("out of memory (1.0 EiB asked for, ")
    assert "iB free on this machine)" in explain(error.value)


def test_fullest_device_is_the_one_with_least_free_memory(monkeypatch):
    memory = {0: DeviceMemory(), 1: DeviceMemory(7, 9), 2: DeviceMemory(5, None)}
    monkeypatch.setattr(
        system,
        "_local_devices",
        lambda: [type("D", (), {"platform": "tpu", "id": n})() for n in memory],
    )
    monkeypatch.setattr(system, "device_memory", lambda device: memory[device.id])
    assert system.fullest_device() == ("tpu:2", memory[2])
    memory = {0: DeviceMemory()}
    assert system.fullest_device() is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (2**40, "1.0 TiB"),
        (2**60, "1.0 EiB"),
    ],
)
def test_readable_formats_bytes(number, text):
    assert readable(number) == text


END = "(set JAX_PLATFORMS='' to automatically choose an available backend)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
            f"with pid 123. No. {END}",
            ("another process holds the TPU", "pid 123", "end it or wait", "JAX_PLATFORMS=cpu"),
        ),
        (
            f"Unable to initialize backend 'tpu': ALREADY_IN_USE: held {END}",
            ("holds the TPU", "ALREADY_IN_USE: held"),
        ),
        (
            "ABORTED: The TPU is already in use by process with pid 7.",
            ("another process holds the device", "pid 7"),
        ),
        (
            "Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: "
            f"out of memory {END}",
            (
                "another process holds the CUDA",
                "CUDA_ERROR_OUT_OF_MEMORY",
                "nvidia-smi",
                "CUDA_VISIBLE_DEVICES",
            ),
        ),
        (
            "INTERNAL: CUDA_ERROR_DEVICE_UNAVAILABLE: CUDA-capable device(s) is/are busy or "
            "unavailable",
            ("another process holds the device", "nvidia-smi"),
        ),
        (
            f"Unable to initialize backend 'tpu': open(/dev/vfio/0): Device or resource busy {END}",
            ("holds the TPU", "/dev/vfio/0"),
        ),
        (
            "Unable to initialize backend 'cuda': FAILED_PRECONDITION: no visible GPU devices. "
            f"{END}",
            ("backend cuda", "no visible GPU", '"jax[cuda13]"'),
        ),
        (
            f"Unable to initialize backend 'x': unknown {END}",
            ("backend x: JAX cannot open it here (unknown)", "set JAX_PLATFORMS=cpu"),
        ),
        (
            f"Unable to initialize backend ' cuda': Backend ' cuda' is not known. {END}",
            ("backend  cuda: JAX cannot open it here (Backend", '"jax[cuda13]"'),
        ),
        ("Unknown backend: 'gpu' requested, but ...", ("backend gpu: JAX cannot open it here",)),
    ],
)
def test_devices_that_cannot_be_opened_are_explained(text, words, monkeypatch):
    monkeypatch.setattr(errors, "_platforms", lambda: "")
    message = explain(RuntimeError(text))
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_other_errors_are_not_device_errors():
    for error in (
        AssertionError(),
        RuntimeError("Address already in use"),
        OSError(16, "Device or resource"),
        KeyError("cuda"),
    ):
        assert not_opened(error) is None
        assert explain(error) is None


def test_command_line_prints_one_line(gpu, capsys):
    with pytest.raises(SystemExit) as ended, reported():
        raise jax.errors.JaxRuntimeError(FULL)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: out of memory (16.0 GiB asked for, {FREE}){HELP}\n"


def test_device_held_by_another_process_is_not_out_of_memory(tmp_path, monkeypatch):
    def devices():
        raise RuntimeError(
            f"Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_OUT_OF_MEMORY {END}"
        )

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(RuntimeError) as error:
        train_and_evaluate(small_config(), tmp_path / "run")
    assert explain(error.value).startswith("another process holds the CUDA")
    assert not (tmp_path / "run").exists()


# A run whose device is full

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
SHORT = {"train__steps": 6, "checkpoint__every": 2, "data__validation_fraction": 0.0}


@pytest.fixture
def full_after(monkeypatch):
    """Returns a function that lets the next run's device run out of memory.

    `arm(calls)` makes the last module's program of the next engine fail after that many calls.
    """

    def arm(calls):
        def make(*args, **options):
            experiment = make_experiment(*args, **options)
            engine, left = experiment.engine, [calls]
            last = len(experiment.spec.modules) - 1
            if isinstance(engine, FusedEngine):
                programs, turn = engine.steps, tuple((k, "step") for k in range(last + 1))
            else:
                programs, turn = (
                    engine.programs,
                    last if isinstance(engine.programs, list) else (last, "step"),
                )
            program = programs[turn]

            def limited(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise jax.errors.JaxRuntimeError(FULL)
                return program(*arguments)

            programs[turn] = limited
            if engine.continuous and calls:
                # Checkpoints are written while workers train: fail only after one is on disk.
                saved, save, fetch = threading.Event(), Checkpoints.save, engine.fetch

                def save_and_tell(self, *arguments):
                    save(self, *arguments)
                    self.finish()
                    saved.set()

                def late_fetch(*arguments):
                    assert left[0] > 0 or saved.wait(60)
                    return fetch(*arguments)

                monkeypatch.setattr(Checkpoints, "save", save_and_tell)
                engine.fetch = late_fetch
            monkeypatch.setattr(train, "make_experiment", make_experiment)
            return experiment

        monkeypatch.setattr(train, "make_experiment", make)

    return arm


@pytest.mark.medium
@pytest.mark.parametrize(
    "engine",
    [
        "fused",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("pipeline", "simulated", "threads", "backprop")
        ),
    ],
)
def test_run_resumes_after_out_of_memory(engine, full_after, tmp_path):
    config = small_config(engine__name=engine, **SHORT)
    full_after(4)
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, tmp_path)
    message, step = (
        str(error.value),
        max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()),
    )
    assert "out of memory (16.0 GiB asked for, " in message
    assert HELP in message
    assert step in ((2, 3, 4) if engine == "threads" else (2, 4))
    if engine == "threads":
        assert message.startswith("module_1 failed after 4 updates: out of memory")
        assert message.endswith(
            "; the other modules have stopped (the log has the traceback); "
            f"the checkpoint of step {step} is good"
        )
    else:
        assert message.endswith(
            f"; the checkpoint of step {step} is good: resume from it with another "
            "config.train.accumulate or config.model.remat, but the same config.data.batch_size"
        )
    assert load_trained(tmp_path).restored.step == step
    config.model.remat = engine == "fused"  # one of the suggested changes
    assert train_and_evaluate(config, tmp_path).steps == 6


@pytest.mark.parametrize("engine", ["fused", "simulated", "threads"])
def test_out_of_memory_at_the_first_step_leaves_no_checkpoint(engine, full_after, tmp_path):
    full_after(0)
    with pytest.raises(
        UserError, match=r"out of memory \(16\.0 GiB asked for, .*; no checkpoint was written yet$"
    ):
        train_and_evaluate(small_config(engine__name=engine, **SHORT), tmp_path)
    workdir.check(
        tmp_path, make_settings(small_config(**SHORT | {"data__batch_size": 4}))
    )  # the workdir accepts a new run


@pytest.mark.parametrize(
    "text", [FULL, "ABORTED: The TPU is already in use by process with pid 7."]
)
def test_device_errors_do_not_mark_checkpoints_as_damaged(text, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoints, "select", lambda which: [3, 2])
    error, tried = jax.errors.JaxRuntimeError(text), []

    def described(step):
        tried.append(step)
        raise error

    monkeypatch.setattr(checkpoints, "_described", described)
    with pytest.raises(jax.errors.JaxRuntimeError, match=text[:30]):
        checkpoints.restore(None)
    assert tried == [3]
    error = ValueError("no JSON")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.restore(None)
    checkpoints.close()


# A missing backend


def launched(platforms, *arguments):
    """Runs the command line under JAX_PLATFORMS and returns its single line of error output."""
    command = [sys.executable, "launch.py", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 2, process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line]
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platforms", "mode", "words"),
    [
        (
            "cuda",
            "train",
            "error: JAX_PLATFORMS=cuda: JAX cannot open it here; if the machine has such a device, "
            'run pip install -U "jax[cuda13]"',
        ),
        (
            "tpu",
            "bench",
            "error: JAX_PLATFORMS=tpu: JAX cannot open it here (INTERNAL: Failed to open "
            "libtpu.so: ",
        ),
        (
            "nonsense",
            "plan",
            "error: JAX_PLATFORMS=nonsense: JAX cannot open it here (Backend 'nonsense' is not in "
            "the list of known ",
        ),
    ],
)
def test_missing_backend_is_one_line(platforms, mode, words, tmp_path):
    flags = ["--config=configs/digits.py", "--config.data.name=synthetic", f"--mode={mode}"]
    if mode != "bench":
        flags.append(f"--workdir={tmp_path / 'run'}")
    assert launched(platforms, *flags).startswith(words)
    assert not (tmp_path / "run").exists()
