"""Paths as a user writes them."""

import os

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
