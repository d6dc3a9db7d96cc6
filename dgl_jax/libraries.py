"""Names the libraries that are not installed, with the line that installs them, and tells the versions of those in use."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dgl_jax import __version__
from dgl_jax.errors import UserError

# Where a library belongs to an extra of pyproject.toml; all others come with the package itself.
_EXTRAS = {"grain": "imagenet", "cv2": "imagenet", "simplejpeg": "imagenet", "tensorboardX": "tensorboard"}
# Of the libraries whose name in pip is not that of the module.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}
# Those that decide the numbers of a run, by their names in pip.
_RECORDED = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "numpy": "numpy",
}


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Turns a library that is missing inside the block into one line with the command that installs it.

    Args:
      what: the mode, flag or field that needs it.

    Raises:
      UserError: a library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "dgl_jax"):  # a defect of the package
            raise
        name = _DISTRIBUTIONS.get(library, library)
        raise UserError(f"{what} needs {name}, which is not installed: {_install(library, name)}") from error


def require(what: str, *libraries: str) -> None:
    """Checks that libraries are installed, without importing them: before a long run, not at its end.

    Args:
      what: the mode, flag or field that needs them.
      libraries: names of modules.

    Raises:
      UserError: one is not installed.
    """
    with needed(what):
        for library in libraries:
            if sys.modules.get(library) is None and importlib.util.find_spec(library) is None:
                raise ModuleNotFoundError(name=library)


def versions() -> dict[str, str]:
    """Returns the version of this package and of each library that decides a run's numbers, by their names in pip.

    A library without metadata (a source tree on the path) answers with its `__version__`, or as "unknown".
    """
    return {"dgl_jax": __version__} | {name: _version(name, module) for name, module in _RECORDED.items()}


def _version(name: str, module: str) -> str:
    try:
        found = importlib.metadata.version(name)
    except Exception:  # not installed, or its metadata are damaged, in one of many ways
        found = None
    return str(found or getattr(sys.modules.get(module), "__version__", None) or "unknown")


def _install(library: str, name: str) -> str:
    """Returns the command that brings a library, at a version that is known to work where the package names one."""
    if extra := _EXTRAS.get(library):
        root = Path(__file__).parents[1]
        checkout = (root / "pyproject.toml").is_file()
        return f'pip install {"-e " if checkout else ""}"{root if checkout else "dgl_jax"}[{extra}]"'
    return f"pip install {name}"
