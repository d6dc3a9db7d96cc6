"""Tests of optional libraries, which are imported when they are used.

A missing one is reported in one line with the command that installs it.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import small_config

from dgl_jax import __version__, errors
from dgl_jax.config import options
from dgl_jax.data import make_source
from dgl_jax.errors import UserError
from dgl_jax.run import summary
from dgl_jax.train import train_and_evaluate

ROOT = Path(errors.__file__).parents[1]
# Lets files of the package import only five libraries and the standard library, as if nothing else
# were installed. The others cannot be uninstalled for the test, since Flax needs some of them.
FIVE = """
import builtins, sys

allowed = {"jax", "flax", "optax", "numpy", "jaxtyping", "dgl_jax", *sys.stdlib_module_names}
real = builtins.__import__

def only_five(name, globals=None, locals=None, fromlist=(), level=0):
    importer = str((globals or {}).get("__name__"))
    if importer.startswith("dgl_jax") and name.partition(".")[0] not in allowed:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = only_five
"""
LIBRARY = """
from functools import partial
import jax, optax
import numpy as np
from dgl_jax import cuts, init_states, local_step, make_head, make_modules, make_network, vq
import dgl_jax.data, dgl_jax.engines, dgl_jax.engines.placement, dgl_jax.replay
import dgl_jax.tools.timeline

network = make_network("cnn4", width=4, num_classes=10, input_shape=(8, 8, 1))
modules = make_modules(network.blocks[:2], cuts("count", 2, 1), [make_head("linear", 10)])
optimizer = optax.sgd(0.1)
inputs = jax.ShapeDtypeStruct((8, 8, 8, 1), "float32")
states = list(init_states(modules, optimizer, jax.random.key(0), inputs))
x, context = np.ones((8, 8, 8, 1), np.float32), {"label": np.arange(8) % 10}
for k, module in enumerate(modules):
    states[k], x, metrics = jax.jit(partial(local_step, module, optimizer))(states[k], x, context)
assert int(states[0].updates) == 1
assert float(metrics["loss"][0]) > 0
x = np.repeat(np.arange(4.0, dtype=np.float32), 8).reshape(4, 8)
book = vq.init(jax.random.key(0), x, codes=4, dims=8)
assert np.array_equal(vq.decode(book.entries, vq.encode(book.entries, x)), x)
print("done")
"""


def run(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **options
    )


@pytest.mark.slow
def test_library_part_needs_five_libraries():
    process = run(FIVE + LIBRARY)
    assert process.stdout == "done\n", process.stderr


def test_twin_import_of_another_library_fails():
    process = run(FIVE.replace('"jaxtyping", ', "") + LIBRARY)
    assert "ModuleNotFoundError: No module named 'jaxtyping'" in process.stderr


COMMAND_LINE = """
import runpy
sys.argv = sys.argv[1:]
runpy.run_module("dgl_jax.cli", run_name="dgl_jax.cli", alter_sys=False)["main"]()
"""


@pytest.mark.parametrize(
    ("present", "line"),
    [
        (
            (),
            "error: the command line needs absl-py, which is not installed: pip install absl-py\n",
        ),
        (
            ("absl", "ml_collections"),
            "error: --mode=plot needs matplotlib, which is not installed: pip install matplotlib\n",
        ),
    ],
)
def test_command_line_names_the_missing_library(tmp_path, present, line):
    five = FIVE.replace(
        '"dgl_jax", ', "".join(f'"{name}", ' for name in ("dgl_jax", "rich", *present))
    )
    process = run(five + COMMAND_LINE, "dgl-jax", "--mode=plot", f"--workdir={tmp_path}")
    assert (process.returncode, process.stdout, process.stderr) == (2, "", line)


@pytest.mark.parametrize(
    ("missing", "fields", "line"),
    [
        (
            "matplotlib",
            {},
            "--mode=train needs matplotlib, which is not installed: pip install matplotlib",
        ),
        (
            "tensorboardX",
            {"log__tensorboard": True},
            "config.log.tensorboard=True needs tensorboardX, which is not installed: "
            "pip install -e ",
        ),
        (
            "grain",
            {"data__name": "imagenette"},
            f'needs grain, which is not installed: pip install -e "{ROOT}[imagenet]"',
        ),
        (
            "cv2",
            {"data__name": "imagenet"},
            "config.data.name=imagenet needs opencv-python-headless, ",
        ),
        (
            "tensorflow_datasets",
            {"data__name": "digits"},
            "config.data.name=digits needs tensorflow-datasets, ",
        ),
    ],
)
def test_run_names_the_missing_library_before_it_starts(
    tmp_path, monkeypatch, missing, fields, line
):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    with pytest.raises(UserError) as caught:
        train_and_evaluate(small_config(**fields), tmp_path / "run")
    assert line in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_digits_need_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="digits needs scikit-learn, "):
        make_source(options("data", name="digits", dir=str(tmp_path)), seed=0)
    assert not list(tmp_path.iterdir())


def test_extra_is_installed_by_path_in_a_checkout_and_else_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "grain", None)
    for root, target in (
        (tmp_path / "site-packages", "dgl_jax[imagenet]"),
        (tmp_path, f"{tmp_path}[imagenet]"),
    ):
        (tmp_path / "pyproject.toml").touch()
        monkeypatch.setattr(errors, "__file__", str(root / "dgl_jax" / "errors.py"))
        with pytest.raises(UserError) as caught:
            errors.require("this", "numpy", "grain")
        assert str(caught.value).endswith(f'"{target}"')


def test_missing_module_of_the_package_itself_raises_as_usual():
    with pytest.raises(ModuleNotFoundError, match="nowhere"), errors.needed("this"):
        import dgl_jax.nowhere  # noqa: F401


def test_versions_survive_damaged_metadata(monkeypatch):
    versions = summary.versions()
    assert versions["dgl_jax"] == __version__
    names = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"]
    assert versions == {"dgl_jax": __version__} | {
        name: importlib.metadata.version(name) for name in names
    }

    def damaged(name):
        if name == "optax":
            return None  # as importlib does if the metadata file is empty
        raise (
            KeyError("Version") if name == "flax" else importlib.metadata.PackageNotFoundError(name)
        )

    monkeypatch.setattr(importlib.metadata, "version", damaged)
    assert summary.versions() == versions
    monkeypatch.delattr(sys.modules["jaxlib"], "__version__")
    assert summary.versions() == versions | {"jaxlib": "unknown"}


@pytest.mark.medium
@pytest.mark.pictures
def test_checkout_without_metadata_trains_to_the_end(tmp_path, monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    train_and_evaluate(small_config(train__steps=1), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["versions"]["dgl_jax"] == __version__
    assert (tmp_path / "plots" / "loss.png").exists()
