"""Rows of a sweep: reading them from a file, checks before the start, and `sweep.json`."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgl_jax.config import Settings, make_settings
from dgl_jax.errors import UserError, explain, where
from dgl_jax.run.checkpoint_folder import check_path
from dgl_jax.run.summary import read_summary
from dgl_jax.run.workdir import conflict, finished, holds_checkpoint, read_json
from dgl_jax.run.writers import write_text
from dgl_jax.tools.commands import shell_command
from dgl_jax.tools.config_files import resolve

_PART = re.compile(r"[A-Za-z0-9._=,-]+")
_TAKEN = ("lock", "sweep.json")  # files of the sweep
Pairs = Iterable[tuple[str, Any]]  # name of a row and its configuration


@dataclass
class Row:
    """Run of a sweep and its state.

    Attributes:
      name: name of the row, a relative path.
      settings: configuration of the run.
      folder: workdir of the run.
      command: command line that trains the run alone.
      state: "waiting", "running", "finished", "failed" or "stopped".
      resumes: True if the folder holds a checkpoint of the run.
      error: last line of the error of a failed row.
      exit_code: exit code of the newest process; negative if a signal ended it.
      seconds: duration of a finished run; otherwise of the newest process.
    """

    name: str
    settings: Settings
    folder: Path
    command: str
    state: str = "waiting"
    resumes: bool = False
    error: str | None = None
    exit_code: int | None = None
    seconds: float | None = None

    def outcome(self) -> str:
        """Returns the test accuracies of a finished run; "" if it has none."""
        summary = read_summary(self.folder)
        if summary is None:
            return ""
        last = summary.modules[-1]["test_accuracy"]
        texts = [] if last is None else [f"test accuracy {last:.4f}"]
        if summary.ensemble_accuracy is not None:
            texts.append(f"ensemble {summary.ensemble_accuracy:.4f}")
        return ", ".join(texts)


def load(value: str) -> Pairs:
    """Reads the rows of a sweep from its Python file.

    Args:
      value: value of `--sweep`: path or name of a file with a function `get_sweep`, and after a
        colon its argument, if there is one.

    Returns:
      An iterator of what `get_sweep` yields.

    Raises:
      UserError: the file is missing, cannot be executed or has no such function. The iterator
        raises it if the function fails.
    """
    path, colon, argument = resolve(value, "--sweep", "claims").partition(":")
    spec = importlib.util.spec_from_file_location("dgl_jax_sweep", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--sweep={path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--sweep: {explain(error) or where(error)}") from error
    function = getattr(module, "get_sweep", None)
    if not callable(function):
        raise UserError(
            f"--sweep={path}: has no function get_sweep; define get_sweep(argument=None), which "
            "yields pairs of a name and a configuration"
        )
    return _called(function, [argument] if colon else [], path)


def _called(function: Callable[..., Pairs], arguments: list[str], path: str) -> Iterator[Any]:
    try:
        yield from function(*arguments)
    except Exception as error:
        raise UserError(f"--sweep={path}: {explain(error) or where(error)}") from error


def overridden(pairs: Pairs, fields: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the rows with some fields changed in all of them.

    Args:
      pairs: name and configuration of each row.
      fields: new values, by name such as `data.dir`.
    """
    for pair in pairs:
        config: Any = pair[-1] if fields and isinstance(pair, tuple) and pair else None
        if hasattr(config, "to_dict"):  # ConfigDict or Settings
            config = config.to_dict()
        if isinstance(config, Mapping):
            config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
            for name, value in fields.items():
                group, _, leaf = name.rpartition(".")
                changed = config.setdefault(group, {}) if group else config
                if isinstance(changed, dict):
                    changed[leaf] = value
            pair = (*pair[:-1], config)
        yield pair  # what is no row is refused later


def make_rows(pairs: Pairs, workdir: Path) -> list[Row]:
    """Checks the rows of a sweep and what their folders hold; writes nothing.

    Args:
      pairs: name and configuration of each row.
      workdir: folder of the sweep.

    Returns:
      The rows in their order: finished ones are marked, all others are waiting.

    Raises:
      UserError: there is no row; or a name is invalid or not unique, a configuration is invalid, or
        the row's folder holds another run. The message names the row.
    """
    rows: dict[str, Row] = {}
    for pair in pairs:
        try:
            name, config = pair
        except (TypeError, ValueError):
            raise UserError(
                f"the sweep yields {type(pair).__name__} {str(pair)[:40]!r}; yield pairs of a name "
                "and a configuration"
            ) from None
        _check_name(name)
        if name in rows:
            raise UserError(f"row {name}: the sweep yields this name twice; names must be unique")
        try:
            # At once: the sweep may change the same configuration for its next row.
            settings = config if isinstance(config, Settings) else make_settings(config)
        except UserError as error:
            raise UserError(f"row {name}: {error}") from error
        except (TypeError, AttributeError):
            raise UserError(
                f"row {name}: its configuration is a {type(config).__name__}; yield a ConfigDict "
                "such as default_config() returns"
            ) from None
        folder = workdir / name
        rows[name] = Row(name, settings, folder, shell_command(settings, folder))
    if not rows:
        raise UserError("the sweep yields no rows; yield pairs of a name and a configuration")
    for name in rows:
        if parent := next((str(p) for p in Path(name).parents if str(p) in rows), None):
            raise UserError(
                f"row {name}: lies inside the folder of row {parent}; use names that do not "
                "contain each other"
            )
    for row in rows.values():
        _compare_with_folder(row)
    return list(rows.values())


def check_given(rows: Iterable[Row], given: Iterable[str]) -> None:
    """Raises UserError if a field that the user has changed in all rows applies to none of them."""
    for name in given:
        reasons = [row.settings.ignored.get(name) for row in rows]
        if all(reasons):
            raise UserError(f"{reasons[0]} in any row")


def _check_name(name: Any) -> None:
    parts = name.split("/") if isinstance(name, str) else []
    fits = bool(parts) and all(_PART.fullmatch(part) and part.strip(".") for part in parts)
    if not fits or parts[0] in _TAKEN:
        raise UserError(
            f"row {name!r}: not a valid name; use letters, digits and . _ = , - in one or more "
            f"parts separated by /, and none of {' '.join(_TAKEN)}"
        )


def _compare_with_folder(row: Row) -> None:
    """Marks a finished row.

    Raises:
      UserError: the folder holds another run.
    """
    check_path(row.folder)
    if not (row.folder / "config.json").exists():
        return
    summary, row.resumes = read_summary(row.folder), holds_checkpoint(row.folder)
    if reason := conflict(row.folder, row.settings):
        raise UserError(
            f"row {row.name}: {row.folder} {reason}; use another --workdir, or another name for "
            "the row"
        )
    if summary is not None and finished(row.folder, row.settings):
        row.state, row.seconds = "finished", summary.wall_seconds


def write(path: Path, name: str, rows: Sequence[Row]) -> None:
    """Writes the states of all rows to `sweep.json`, atomically.

    Rows of other sweeps in the same folder stay there.

    Args:
      path: the file.
      name: value of `--sweep`.
      rows: all rows in their order.
    """
    entries = {
        row.name: {
            "state": row.state,
            "command": row.command,
            "error": row.error,
            "exit_code": row.exit_code,
            "seconds": None if row.seconds is None else round(row.seconds, 1),
        }
        for row in rows
    }
    try:
        others = read_json(path, "rows")["rows"]
        entries = {other: row for other, row in others.items() if other not in entries} | entries
    except (UserError, AttributeError):
        pass  # there is none, or it is damaged
    write_text(path, json.dumps({"sweep": name, "rows": entries}, indent=2) + "\n")
