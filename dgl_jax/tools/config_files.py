"""Finds the file that `--config` means: one of the user's, or one that is shipped with the package."""

import re
from collections.abc import Sequence
from pathlib import Path

from dgl_jax.errors import UserError
from dgl_jax.fields import expand
from dgl_jax.registry import nearest

# In a checkout a link to the folder `configs/` at its root.
SHIPPED = Path(__file__).parents[1] / "configs"


def resolve(value: str) -> str:
    """Returns the path of a configuration file, with the argument that may follow a colon.

    Args:
      value: a path; the bare name of a shipped configuration (`digits`); or the path that a shipped one has in a checkout
        (`configs/digits.py`), which means it everywhere.

    Raises:
      UserError: there is no such file; the nearest names are given.
    """
    name, colon, argument = value.partition(":")
    path, stem = Path(expand(name, "--config")), re.fullmatch(r"(?:configs/)?(\w+?)(?:\.py)?", name)
    shipped = sorted(file.stem for file in SHIPPED.glob("[!_]*.py"))
    if path.is_file() or stem is None:
        return f"{path}{colon}{argument}"
    if stem[1] in shipped:
        return f"{SHIPPED / stem[1]}.py{colon}{argument}"
    if path.exists() or (path.suffix == ".py" and path.parent.is_dir() and path.parent != Path()):
        return f"{path}{colon}{argument}"  # where it is read, an error names what lies beside it
    raise UserError(
        f"--config={name}: neither a file nor a configuration of dgl_jax; {nearest(stem[1], shipped)}"
    )


def with_files(argv: Sequence[str]) -> list[str]:
    """Returns a command line in which `--config` names a file, see `resolve`."""
    found = list(argv)
    for place, argument in enumerate(argv):
        if match := re.match(r"(--?config=)(.+)", argument):
            found[place] = match[1] + resolve(match[2])
        elif place and re.fullmatch("--?config", argv[place - 1]):
            found[place] = resolve(argument)
    return found
