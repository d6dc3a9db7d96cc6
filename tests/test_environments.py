"""The command line under environments that others have set up: none of them may decide whether a run finishes."""

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
# A process a mode, as on a command line; but what all of them import is imported once.
MODES = """
import json, os, sys
from dgl_jax import cli, export, train

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
pwd.getpwuid = nobody  # as under a user without an entry among the system's, such as any number in a container
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of two classes, one of them with a name that is not ASCII."""
    root, random = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("größer", "kleiner")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(100 * label, 100 * label + 100, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def command_lines(images: Path, workdir: Path) -> list[list[str]]:
    """Command lines: a run with a learnt codec, and all that may follow it."""
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
    }
    run = ["--config=digits", *(f"--config.{name}={value}" for name, value in fields.items())]
    there = f"--workdir={workdir}"
    return [
        ["--mode=train", there, *run],
        ["--mode=predict", there, f"--images={images / 'test'}"],
        [
            "--mode=predict",
            there,
            f"--images={images / 'test'}",
            f"--output={workdir / 'predicted.csv'}",
        ],
        ["--mode=export", there, f"--output={workdir / 'exported'}"],
        ["--mode=plot", there],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        # Settings that do not affect each other share a run, which takes ten seconds.
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
def test_a_run_and_what_follows_it(environment, images, tmp_path):
    homeless = environment.get("HOME") == ""
    command = [
        sys.executable,
        "-c",
        (HOMELESS if homeless else "") + MODES,
        json.dumps(command_lines(images, tmp_path / "run")),
    ]
    env = os.environ | {"TMPDIR": str(tmp_path)} | environment
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert all(np.isfinite(error) for error in summary["codec_error"])
    rows = (tmp_path / "run" / "predicted.csv").read_bytes().decode().splitlines()
    assert len(rows) == 1 + 8
    assert {row.split(",")[1] for row in rows[1:]} <= {"größer", "kleiner"}
    assert (tmp_path / "run" / "plots" / "accuracy.png").exists()
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()
