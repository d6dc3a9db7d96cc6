"""Folder of a run: its lock, its configuration, and if the run is finished.

This file must not import JAX: the command line reads a configuration from a workdir before it
decides how many devices JAX starts with.
"""

import fcntl
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgl_jax import system
from dgl_jax.config import Settings, default_config, differences, make_settings
from dgl_jax.config.fields import expand
from dgl_jax.errors import (
    ModuleFailed,
    UserError,
    is_disk_full,
    not_opened,
    of_a_path,
    out_of_memory,
)
from dgl_jax.run.checkpoint_folder import check_path, checkpoint_steps
from dgl_jax.run.summary import Summary, read_summary

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_LOG = logging.getLogger(__name__)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
      path: the file.
      keys: keys that the object must have.

    Raises:
      UserError: the file is missing, damaged, or lacks a key; the message names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        reason = (
            "" if isinstance(values, dict) else f"it holds {json.dumps(values)[:20]}, not an object"
        )
        missing = [key for key in keys if not reason and key not in values]
        reason = reason or (f"it lacks {missing[0]}" if missing else "")
    except FileNotFoundError:
        reason = "no such file"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise UserError(f"{path}: cannot be read ({reason}); restore the file")
    return values


def load_settings(path: Path) -> Settings:
    """Reads the configuration of a run from its `config.json`.

    Raises:
      UserError: the file cannot be read or is not a configuration; the message names the file.
    """
    values = read_json(path)
    try:
        return make_settings(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def get_config(workdir: str) -> "ConfigDict":
    """Returns the configuration of the run in a workdir; without one, the default.

    This function makes the present file a configuration file for ml_collections:
    `--config=dgl_jax/run/workdir.py:runs/digits` loads the configuration of `runs/digits`.
    """
    if not workdir:
        return default_config()
    settings = load_settings(Path(workdir) / "config.json")
    config = default_config(settings.plugins)
    for name, value in settings.to_dict().items():
        if isinstance(value, dict):
            config[name].update(
                {leaf: tuple(v) if isinstance(v, list) else v for leaf, v in value.items()}
            )
        else:
            config[name] = tuple(value) if isinstance(value, list) else value
    return config


def with_own_config(argv: list[str]) -> list[str]:
    """Adds `--config` to a command line that overrides fields but names no configuration.

    Such a command line changes the configuration of the run in its `--workdir`. With `--mode=sweep`
    it changes all rows; the added configuration is then the default one.

    Args:
      argv: the command line.

    Returns:
      The command line, with the configuration of that run if it was needed.

    Raises:
      UserError: the workdir holds no run.
    """
    override = next((argument for argument in argv if re.match(r"--?config\.", argument)), None)
    if override is None or any(re.match(r"--?config(=|$)", argument) for argument in argv):
        return argv
    if _value(argv, "mode") == "sweep":
        return [argv[0], f"--config={__file__}:", *argv[1:]]
    workdir = expand(_value(argv, "workdir") or "", "--workdir")
    if not workdir or not (Path(workdir) / "config.json").is_file():
        raise UserError(
            f"{override}: which configuration? add --config=configs/..., or --workdir=DIR of a run "
            "that has one"
        )
    return [argv[0], f"--config={__file__}:{workdir}", *argv[1:]]


def _value(argv: list[str], name: str) -> str | None:
    """Returns the value of a flag written as `--name=value` or `--name value`; None without it."""
    flag = re.compile(rf"--?{name}(?:=(.*))?")
    for place, argument in reversed([*enumerate(argv)]):  # the last one counts
        if match := flag.fullmatch(argument):
            return next(iter(argv[place + 1 :]), None) if match[1] is None else match[1]
    return None


@contextmanager
def lock(workdir: Path, work: str = "training") -> Iterator[None]:
    """Creates the workdir and locks it against a second training for the `with` block.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
      workdir: the folder to lock.
      work: what is done there, for the message.

    Raises:
      UserError: the workdir cannot be written, or another training holds the lock.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror})") from error
    with file:
        if not system.flock(file, f"--workdir={workdir}", seconds=1.0):
            raise UserError(f"--workdir={workdir}: another {work} is running there")
        yield


def is_locked(workdir: Path) -> bool:
    """Returns True if a process trains in the workdir at this moment."""
    try:
        with open(workdir / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock file
        pass
    return False


@contextmanager
def reporting(workdir: Path) -> Iterator[None]:
    """Turns a full disk, an unusable path, or exhausted memory into a one-line error.

    After exhausted memory, or the failure of a module, the message also tells from which checkpoint
    the run can resume.

    Raises:
      UserError: one of these errors occurred inside the `with` block.
    """
    try:
        yield
    except ModuleFailed as error:
        raise UserError(f"{error}; {_newest(workdir)}") from error.__cause__
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"{workdir}: the disk is full; free some space and run the same command again"
            ) from error
        if isinstance(error, OSError) and (text := of_a_path(error)):
            raise UserError(text) from error
        if not_opened(error) or (text := out_of_memory(error)) is None:
            raise
        advice = (
            ": resume from it with another config.train.accumulate or config.model.remat, but the "
            "same config.data.batch_size"
        )
        raise UserError(f"{text}; {_newest(workdir, advice)}") from error


def _newest(workdir: Path, advice: str = "") -> str:
    """Returns from which checkpoint the run can resume, followed by advice if there is one."""
    steps = _steps(workdir)
    if not steps:
        return "no checkpoint was written yet"
    return f"the checkpoint of step {max(steps)} is good{advice}"


def check(workdir: Path, settings: Settings) -> None:
    """Checks that the workdir can hold this run and does not hold a run of another configuration.

    Raises:
      UserError: it holds another run (the message names the fields that differ), a sweep or an
        export, its config.json is missing or damaged, or checkpoints could not be read back from
        this path.
    """
    check_path(workdir, "--workdir")
    check_path(workdir / "checkpoints")
    if (workdir / "sweep.json").exists():
        raise UserError(
            f"--workdir={workdir}: holds the rows of a sweep; a run needs a folder of its own"
        )
    if (workdir / "model.safetensors").exists():
        raise UserError(f"--workdir={workdir}: holds an export; a run needs a folder of its own")
    if reason := conflict(workdir, settings):
        raise UserError(
            f"--workdir={workdir}: {reason}; use another workdir, or start from its weights with "
            "--init_from"
        )


def conflict(workdir: Path, settings: Settings) -> str:
    """Returns why the run in a folder cannot be resumed with these settings; "" if it can.

    Raises:
      UserError: its config.json is missing or damaged.
    """
    summary, resumes = read_summary(workdir), holds_checkpoint(workdir)
    if summary is None and not resumes:
        return ""  # nothing is lost by starting over
    if changed := differences(load_settings(workdir / "config.json"), settings):
        return f"holds a run of another configuration: {'; '.join(changed)}"
    if not resumes and finished(workdir, settings) is None:
        return "holds a finished run without checkpoints, which cannot be extended"
    return ""


def holds_run(folder: Path) -> bool:
    """Returns True if a folder is the workdir of a run, finished or not."""
    return any((folder / name).exists() for name in ("checkpoints", "summary.json"))


def holds_checkpoint(workdir: Path) -> bool:
    """Returns True if the workdir holds a checkpoint, intact or damaged."""
    return bool(_steps(workdir))


def _steps(workdir: Path) -> list[int]:
    return checkpoint_steps(workdir / "checkpoints")


def finished(workdir: Path, settings: Settings) -> Summary | None:
    """Returns the summary of a finished run, or None if there is something left to train.

    Args:
      workdir: folder of the run.
      settings: new settings of the run; more steps or epochs than before extend it.
    """
    summary = read_summary(workdir)
    if summary is None or not (workdir / "config.json").exists():
        return None
    before = load_settings(workdir / "config.json").train
    wanted = settings.train
    if wanted == before or (wanted.steps and wanted.steps <= summary.steps):
        return summary
    # The summary rounds epochs to three digits.
    more = wanted.epochs > summary.epochs + 1e-3 if not wanted.steps else True
    return None if more else summary
