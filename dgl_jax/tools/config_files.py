"""Resolves `--config` to a file of the user or to one that is shipped with the package."""

import re
from collections.abc import Sequence
from pathlib import Path

from dgl_jax.config import import_plugins
from dgl_jax.config.fields import expand
from dgl_jax.config.registry import nearest
from dgl_jax.errors import UserError

# In a source checkout this is a link to the folder `configs/` at the root.
SHIPPED = Path(__file__).parents[1] / "configs"


def resolve(value: str, flag: str = "--config", folder: str = "") -> str:
    """Returns the path of the file that a value of `--config` or `--sweep` names.

    Args:
      value: a path, the bare name of a shipped file (`digits`), or its path in a checkout
        (`configs/digits.py`), which works from any directory. A file of the user wins over a
        shipped one. An argument for the file may follow after a colon.
      flag: name of the flag.
      folder: folder below `configs/` with the shipped files of this flag; it may be omitted.

    Returns:
      The path, followed by the colon and argument if there were any.

    Raises:
      UserError: if there is no such file; the message suggests the nearest names.
    """
    name, colon, argument = value.partition(":")
    inside = f"(?:{folder}/)?" if folder else ""
    path = Path(expand(name, flag))
    stem = re.fullmatch(rf"(?:configs/)?{inside}(\w+?)(?:\.py)?", name)
    shipped = sorted(file.stem for file in (SHIPPED / folder).glob("[!_]*.py"))
    if path.is_file() or stem is None:
        return f"{path}{colon}{argument}"
    if stem[1] in shipped:
        return f"{SHIPPED / folder / stem[1]}.py{colon}{argument}"
    if path.exists() or (path.suffix == ".py" and path.parent.is_dir() and path.parent != Path()):
        return f"{path}{colon}{argument}"  # reading it fails with an error that lists its neighbors
    raise UserError(
        f"{flag}={name}: neither a file nor a {'sweep' if folder else 'configuration'} of dgl_jax; "
        f"{nearest(stem[1], shipped)}"
    )


def with_plugins(argv: Sequence[str]) -> list[str]:
    """Imports the modules of `--config.plugins`, whose fields other flags may set.

    Returns:
      The command line with the value of `--config.plugins` rewritten as a tuple.
    """
    line = list(argv)
    for place, argument in enumerate(argv):
        if given := re.match(r"(--?config\.plugins=)(.*)", argument):
            prefix, value = given.groups()
        elif place and re.fullmatch(r"--?config\.plugins", argv[place - 1]):
            prefix, value = "", argument
        else:
            continue
        names = tuple(re.findall(r"[\w.]+", value))
        import_plugins(names)
        line[place] = f"{prefix}{names!r}"
    return line


def with_files(argv: Sequence[str]) -> list[str]:
    """Returns the command line with every value of `--config` resolved to a path, see `resolve`."""
    resolved = list(argv)
    for place, argument in enumerate(argv):
        if match := re.match(r"(--?config=)(.+)", argument):
            resolved[place] = match[1] + resolve(match[2])
        elif place and re.fullmatch("--?config", argv[place - 1]):
            resolved[place] = resolve(argument)
    return resolved


def original(error: BaseException) -> BaseException:
    """Returns the exception that a configuration file raised, if `error` quotes its traceback.

    ml_collections and absl wrap errors of value and type in others.
    """
    cause: BaseException | None = error
    while cause is not None and not str(cause).startswith("Error whilst parsing config file"):
        cause = cause.__cause__ or cause.__context__
    return (cause.__context__ if cause else None) or error
