"""Tests of the command line in unusual environments, in which every mode must still succeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import FIELDS

ROOT = Path(__file__).parents[1]
# Runs each mode in a process of its own, as a shell would. The processes are forked, so that the
# slow imports happen once.
MODES = """
import json, os, sys
from dgl_jax import cli, train
from dgl_jax.tools import export

for mode in json.loads(sys.argv[1]):
    print(mode[0], file=sys.stderr, flush=True)
    if not (child := os.fork()):
        sys.argv[:] = ["dgl-jax", *mode]
        cli.main()
        sys.exit()
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(code)
"""
HOMELESS = """
import os, pwd

def nobody(_):
    raise KeyError("no such user")

del os.environ["HOME"]
pwd.getpwuid = nobody  # as for the numeric users of containers, which are not in /etc/passwd
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Returns a folder of images in two classes, one of which has a name that is not ASCII."""
    root, random = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("größer", "kleiner")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(100 * label, 100 * label + 100, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def command_lines(images: Path, workdir: Path) -> list[list[str]]:
    """Returns the arguments of a run with a learned codec, and of modes that read its workdir."""
    fields = FIELDS | {
        "data.name": "folder",
        "data.dir": images,
        "data.train_examples": 0,
        "train.steps": 4,
        "eval.every": 2,
    }
    fields |= {
        "codec.name": "vq",
        "codec.codes": 8,
        "codec.dims": 4,
        "train.ema": 0.5,
        "log.tensorboard": True,
        "diagnostics.enabled": True,
        "diagnostics.every": 2,
        "diagnostics.batches": 1,
    }
    run = ["--config=digits", *(f"--config.{name}={value}" for name, value in fields.items())]
    workdir_flag = f"--workdir={workdir}"
    return [
        ["--mode=train", workdir_flag, *run],
        ["--mode=predict", workdir_flag, f"--images={images / 'test'}"],
        [
            "--mode=predict",
            workdir_flag,
            f"--images={images / 'test'}",
            f"--output={workdir / 'predicted.csv'}",
        ],
        ["--mode=export", workdir_flag, f"--output={workdir / 'exported'}"],
        ["--mode=plot", workdir_flag],
        ["--mode=eval", workdir_flag, "--split=train"],
        ["--mode=report", workdir_flag],
        ["--mode=plan", "--config=digits", "--config.codec.name=vq", "--block_times=1,2,2,1"],
        ["--mode=bench", *run, "--bench_steps=2"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        # Each run takes ten seconds, so settings that do not affect each other share one.
        pytest.param(
            {
                "JAX_ENABLE_X64": "1",
                "JAX_DEFAULT_PRNG_IMPL": "rbg",
                "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            },
            id="x64, rbg, plots",
        ),
        pytest.param(
            {
                "JAX_DEBUG_NANS": "1",
                "LC_ALL": "C",
                "PYTHONUTF8": "0",
                "PYTHONCOERCECLOCALE": "0",
                "HOME": "",
            },
            id="nans, ascii, homeless",
        ),
    ],
)
def test_modes_succeed_in_unusual_environments(environment, images, tmp_path):
    homeless = environment.get("HOME") == ""
    command = [
        sys.executable,
        "-c",
        (HOMELESS if homeless else "") + MODES,
        json.dumps(command_lines(images, tmp_path / "run")),
    ]
    env = os.environ | {"TMPDIR": str(tmp_path)} | environment
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert all(np.isfinite(error) for error in summary["codec_error"])
    rows = (tmp_path / "run" / "predicted.csv").read_bytes().decode().splitlines()
    assert len(rows) == 1 + 8
    assert {row.split(",")[1] for row in rows[1:]} <= {"größer", "kleiner"}
    assert (tmp_path / "run" / "plots" / "accuracy.png").exists()
    assert (tmp_path / "run" / "plots" / "convergence.png").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()
