"""Paths as a user writes them, and the project's cache directory."""

import os
import tempfile
from pathlib import Path

from dgl_jax.errors import UserError


def expand(path: str, name: str) -> str:
    """Returns a path whose leading `~` or `~user` has become the home directory.

    A shell does that only where a word begins: `--workdir=~/runs` comes as it is written.

    Args:
      path: as the user wrote it.
      name: the flag or field that holds it.

    Raises:
      UserError: no such home is known here.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = expanded.partition("/")[0]
        raise UserError(f"{name}={path}: the home directory {home} is not known here; write the path in full, or ./{home}")
    return expanded


def cache_dir() -> Path:
    """Returns where the project keeps what it can make again: prepared data sets (`tfds/`), decoded images, labels.

    Below the home directory; where there is none that can be written, as under a user without one in a container, below the
    system's directory of temporary files.
    """
    home = Path(os.path.expanduser("~"))
    kept = home / ".cache" / "dgl_jax"
    if home.is_absolute() and (kept.is_dir() or os.access(home, os.W_OK)):
        return kept
    return Path(tempfile.gettempdir()) / f"dgl_jax-{os.getuid()}"
