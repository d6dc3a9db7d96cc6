"""Tests of the installed package: a wheel with few libraries, and a checkout run directly."""

import ast
import json
import os
import re
import shutil
import subprocess
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from test_libraries import LIBRARY

import dgl_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "benchmarks", "tests", "*.egg-info", "__pycache__", ".*_cache"
)
SMALL = [
    "--config.train.steps=2",
    "--config.model.width=4",
    "--config.model.head=linear",
    "--config.log.every=1",
]


def test_project_metadata_is_complete():
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0"
    license_text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in license_text
    assert "Copyright The dgl_jax authors" in license_text
    assert {"1901.08164", "2106.06401"} <= set(
        re.findall(r"\d{4}\.\d{5}", (ROOT / "CITATION.cff").read_text())
    )
    assert (ROOT / "dgl_jax" / "py.typed").exists()
    versions = {
        text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text
    }
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert {"3.11", "3.13"} <= versions
    assert 'python: ["3.11", "3.13"]' in workflow


def test_public_names_equal_those_type_checkers_see():
    """Compares the lazily imported names with the imports under TYPE_CHECKING."""
    tree = ast.parse(Path(dgl_jax.__file__).read_text())
    (type_checking,) = (node for node in tree.body if isinstance(node, ast.If))
    rooms = {node.module: tuple(alias.name for alias in node.names) for node in type_checking.body}
    assert {f"dgl_jax.{room}": names for room, names in dgl_jax._ROOMS.items()} == rooms
    assert sorted(name for names in rooms.values() for name in names) == sorted(dgl_jax.__all__)
    assert set(dgl_jax.__all__) <= set(dir(dgl_jax))
    assert all(getattr(dgl_jax, name) is not None for name in dgl_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dgl_jax.nothing  # noqa: B018


def call(*command: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command in an environment that does not point to this checkout.

    Args:
      *command: program and arguments.
      cwd: working directory.
      status: expected exit status.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")
    }
    process = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == status, process.stdout + process.stderr
    return process


@pytest.mark.slow
def test_wheel_and_checkout_work_in_a_new_environment(tmp_path):
    """Tests several stages in one environment, since installing takes most of the time."""
    venv.create(tmp_path / "venv", with_pip=True)
    bin, empty, checkout = tmp_path / "venv" / "bin", tmp_path / "empty", tmp_path / "checkout"
    empty.mkdir()
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=NOT_COPIED)
    pip = [bin / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    download = subprocess.run(
        [*pip, "download", "--no-deps", "absl-py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if download.returncode:
        pytest.skip(f"packages cannot be downloaded: {download.stderr.strip().splitlines()[-1]}")

    # The wheel holds the package with its configurations, and nothing else.
    call(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, checkout, cwd=empty)
    (wheel,) = tmp_path.glob("dgl_jax-*.whl")
    wheel_files = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in wheel_files} == {
        "dgl_jax",
        f"dgl_jax-{dgl_jax.__version__}.dist-info",
    }
    sources = [path for path in (ROOT / "dgl_jax").rglob("*.py") if "configs" not in path.parts]
    sources += [
        Path("dgl_jax") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")
    ]
    assert {
        str(path.relative_to(ROOT) if path.is_absolute() else path) for path in sources
    } <= wheel_files
    others = {"py.typed", "tools/report.css", "tools/report.js"}
    assert {f"dgl_jax/{name}" for name in others} <= wheel_files

    # The library part works with only the five libraries that it needs.
    call(*pip, "install", "--no-compile", "jax", "flax", "optax", "numpy", "jaxtyping", cwd=empty)
    call(*pip, "install", "--no-compile", "--no-deps", wheel, cwd=empty)
    assert call(bin / "python", "-c", LIBRARY, cwd=empty).stdout == "done\n"
    for library in (
        "ml_collections",
        "matplotlib",
        "tensorflow_datasets",
    ):  # twin: other libraries are not installed
        call(bin / "python", "-c", f"import {library}", cwd=empty, status=1)
    missing = call(
        bin / "dgl-jax", "--config=digits", f"--workdir={empty / 'run'}", cwd=empty, status=2
    ).stderr
    assert re.fullmatch(
        "error: the command line needs .*, which is not installed: pip install .*\n", missing
    )

    # A checkout that is not installed can be run directly.
    call(*pip, "uninstall", "--yes", "dgl_jax", cwd=empty)
    call(*pip, "install", "--no-compile", "--requirement", "requirements.txt", cwd=checkout)
    call(bin / "python", "-c", "import dgl_jax", cwd=empty, status=1)
    launch = [
        bin / "python",
        "launch.py",
        "--config=configs/digits.py",
        "--workdir=runs/digits",
        *SMALL,
    ]
    run = checkout / "runs" / "digits"
    call(*launch, cwd=checkout)
    first = json.loads((run / "summary.json").read_text())
    assert first["versions"]["dgl_jax"] == dgl_jax.__version__
    assert "unknown" not in first["versions"].values()
    assert {"accuracy.png", "loss.png"} <= {path.name for path in (run / "plots").iterdir()}
    assert "resuming from step 2" in call(*launch, "--config.train.steps=3", cwd=checkout).stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 3

    # Outside a checkout the wheel finds its configurations by name and by path, and names the extra
    # that is missing.
    call(*pip, "install", "--no-compile", "--no-deps", wheel, cwd=empty)
    call(bin / "dgl-jax", "--config=digits", "--workdir=run", *SMALL, cwd=empty)
    assert (empty / "run" / "plots" / "accuracy.png").exists()
    assert (
        call(bin / "dgl-jax", "--mode=export", "--workdir=run", cwd=empty).stdout == "run/export\n"
    )
    assert (
        "did you mean cifar10"
        in call(bin / "dgl-jax", "--config=cifar", "--workdir=x", cwd=empty, status=2).stderr
    )
    call(bin / "python", "-c", "import configs", cwd=empty, status=1)
    imagenet = ["--config=configs/imagenet_vgg13_modern.py", "--workdir=imagenet"]
    missing = call(bin / "dgl-jax", *imagenet, cwd=empty, status=2).stderr
    assert missing.endswith('which is not installed: pip install "dgl_jax[imagenet]"\n')
    assert not (empty / "imagenet").exists()
    assert "dgl-jax:" in call(bin / "dgl-jax", "--help", cwd=empty, status=1).stdout
