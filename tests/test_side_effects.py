"""Tests that importing the package changes nothing outside of it."""

import subprocess
import sys

import pytest

SIDE_EFFECTS = """
import importlib, logging, os, pkgutil, signal
import jax
from absl import flags

def observe():
    names = [name for name in logging.root.manager.loggerDict if name.startswith("dgl_jax")]
    loggers = [logging.root, *map(logging.getLogger, names)]
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "handlers": [list(logger.handlers) for logger in loggers if logger.handlers],
        "levels": {logger.name: logger.level for logger in loggers[1:] if logger.level},
        "root": logging.root.level,
        "flags": [name for name in flags.FLAGS.flags_by_module_dict() if "dgl_jax" in name],
    }

def changed():
    after = observe()
    return [name for name in before if before[name] != after[name]]

before = observe()
import dgl_jax
assert changed() == [], changed()
# These side effects are not the package's: Orbax logs while it is imported, for which absl installs
# a root handler, and TFDS imports OpenCV, which changes LD_LIBRARY_PATH.
from orbax.checkpoint import v1
import tensorflow_datasets
before = observe()
for room in pkgutil.walk_packages(dgl_jax.__path__, "dgl_jax."):
    if room.name != "dgl_jax.cli":  # the command line defines flags
        importlib.import_module(room.name)
assert changed() == [], changed()
jax.config.update("jax_num_cpu_devices", 2)  # refused once a backend has started

# The same checks on a package that does have side effects.
logging.getLogger("dgl_jax.train").addHandler(logging.NullHandler())
os.environ["DGL_JAX_SIDE_EFFECT"] = "1"
jax.numpy.zeros(2)
assert changed() == ["environment", "handlers"], changed()
try:
    jax.config.update("jax_num_cpu_devices", 3)
except RuntimeError:
    print("done")
"""


@pytest.mark.medium
def test_import_has_no_side_effects():
    process = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True)
    assert process.stdout == "done\n", process.stderr
