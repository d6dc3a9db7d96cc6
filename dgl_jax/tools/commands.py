"""Command line that trains a run with given settings.

No device is opened: a sweep and a report compute commands while other processes use the devices.
"""

import runpy
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgl_jax.config import Settings, field_names, fields_of, make_settings, values_of
from dgl_jax.errors import UserError
from dgl_jax.tools.config_files import SHIPPED, resolve

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def command_of(settings: Settings) -> list[str]:
    """Returns the flags that select a configuration.

    The flags name the shipped configuration that differs in the fewest fields, and set the fields
    that differ. A run of these flags has the hash of `settings`. The only exception are fields of
    `settings` that have no effect and which the command line refuses for that reason: they are left
    out if no shipped configuration sets them to the same values.

    Args:
      settings: complete settings of the run.

    Returns:
      `--config=configs/NAME.py`, followed by one `--config.a.b=value` per field that differs.
    """
    candidates = sorted(_candidates(settings), key=lambda candidate: len(candidate[1]))
    for ignored in ((), tuple(settings.ignored)):
        for name, changes in candidates:
            chosen = {field: value for field, value in changes.items() if field not in ignored}
            if _same(name, chosen, settings, ignored):
                return [f"--config={name}", *_flags(chosen)]
    raise UserError("no shipped configuration can be changed to these settings")


def shell_command(settings: Settings, workdir: str | Path) -> str:
    """Returns the command line, quoted for a shell, that trains a run in a workdir."""
    return shlex.join(["python", "launch.py", *command_of(settings), f"--workdir={Path(workdir)}"])


def _candidates(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every shipped configuration with the fields in which `settings` differs from it."""
    wanted = values_of(settings)
    for name in _shipped():
        present = _present(name, tuple(field_names()))
        yield name, {field: v for field, v in wanted.items() if v != present[field]}


def _same(name: str, changes: dict[str, Any], settings: Settings, ignored: Sequence[str]) -> bool:
    """Returns True if the changed configuration is accepted and equals `settings`.

    Args:
      name: name of a shipped configuration.
      changes: values of fields that the command line sets.
      settings: settings to compare with.
      ignored: names of fields without an effect, which may differ.
    """
    config = _load(name, tuple(field_names())).copy_and_resolve_references()
    for field, value in changes.items():
        group, _, leaf = field.rpartition(".")
        (config[group] if group else config)[leaf] = value
    try:
        result = make_settings(config, [field for field in changes if field != "plugins"])
    except UserError:
        return False
    wanted, values = values_of(settings), values_of(result)
    return all(field in ignored or values.get(field) == v for field, v in wanted.items())


def _flags(changes: dict[str, Any]) -> list[str]:
    """Returns one flag per changed field."""
    flags = []
    for field, value in changes.items():
        if field == "plugins":  # the command line reads them before all other flags
            text = ",".join(value)
        else:
            text = value if isinstance(value, str) else repr(value)
        if isinstance(value, tuple):
            text = text.replace(", ", ",")
        flags.append(f"--config.{field}={text}")
    return flags


def _shipped() -> list[str]:
    return [f"configs/{path.name}" for path in sorted(SHIPPED.glob("[!_]*.py"))]


@cache
def _load(name: str, fields: tuple[str, ...]) -> "ConfigDict":
    """Returns the configuration that `--config=name` loads; `fields` change with the plugins."""
    return runpy.run_path(resolve(name))["get_config"]()


@cache
def _present(name: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """Returns the value of every field after `--config=name`, also of kinds not chosen there."""
    settings = make_settings(_load(name, fields))
    groups = {field.rpartition(".")[0] for field in fields} - {""}
    defaults = {group: fields_of(group) for group in groups}
    values = {}
    for field in fields:
        group, _, leaf = field.rpartition(".")
        if group:
            values[field] = defaults[group][leaf].default
    return values | dict(settings.unused) | values_of(settings)
