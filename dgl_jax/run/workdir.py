"""The folder of a run: its lock, its configuration, and whether it is finished.

Starts no device: the command line says how many there are after it has read a configuration.
"""

import fcntl
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgl_jax.config import Settings, default_config, differences, make_settings
from dgl_jax.errors import UserError, is_disk_full, not_opened, of_a_path, out_of_memory
from dgl_jax.fields import expand
from dgl_jax.run.summary import Summary, read_summary

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_LOG = logging.getLogger(__name__)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object, with at least these keys.

    Raises:
      UserError: it is missing, or holds something else; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        reason = (
            ""
            if isinstance(values, dict)
            else f"it holds {type(values).__name__} and not an object"
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
      UserError: see `read_json`, or it is no configuration; names the file.
    """
    values = read_json(path)
    try:
        return make_settings(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def get_config(workdir: str) -> "ConfigDict":
    """A run's configuration: this file is a configuration file itself, `--config=dgl_jax/run/workdir.py:runs/digits`."""
    settings = load_settings(Path(workdir) / "config.json")
    config = default_config(settings.plugins)
    for name, value in settings.to_dict().items():
        if isinstance(value, dict):
            config[name].update(
                {leaf: tuple(of) if isinstance(of, list) else of for leaf, of in value.items()}
            )
        else:
            config[name] = tuple(value) if isinstance(value, list) else value
    return config


def with_own_config(argv: list[str]) -> list[str]:
    """Command lines that override fields and name the workdir of a run, but no configuration: they mean that run's.

    Raises:
      UserError: there is no such run.
    """
    override = next((argument for argument in argv if re.match(r"--?config\.", argument)), None)
    if override is None or any(re.match(r"--?config(=|$)", argument) for argument in argv):
        return argv
    flag = re.compile(r"--?workdir=(.+)")
    workdir = next(
        (expand(match[1], "--workdir") for argument in argv if (match := flag.match(argument))),
        None,
    )
    if workdir is None or not (Path(workdir) / "config.json").is_file():
        raise UserError(
            f"{override}: which configuration? add --config=configs/..., or --workdir=DIR of a run that has one"
        )
    return [argv[0], f"--config={__file__}:{workdir}", *argv[1:]]


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps a second training off it; the system lets go of the lock when the process ends, however."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir={workdir}: another training is running there") from None
        yield


@contextmanager
def reporting(workdir: Path) -> Iterator[None]:
    """Turns a full disk, a path that cannot be used and used-up memory into one line; the last says what the run can go on from.

    Raises:
      UserError: in their place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"{workdir}: the disk is full; free some space and run the same line again"
            ) from error
        if isinstance(error, OSError) and (text := of_a_path(error)):
            raise UserError(text) from error
        if not_opened(error) or (text := out_of_memory(error)) is None:
            raise
        kept = "no checkpoint was written yet"
        if steps := _steps(workdir):
            kept = (
                f"the checkpoint of step {max(steps)} is good, and the run goes on from there under another "
                "config.train.accumulate or config.model.remat; another config.data.batch_size is another run"
            )
        raise UserError(f"{text}; {kept}") from error


def check(workdir: Path, settings: Settings) -> None:
    """Checks that the workdir can hold this run, and holds no run of another configuration.

    Raises:
      UserError: it does, with the fields that differ; or nobody can tell, as its config.json is missing or damaged; or
        checkpoints could not be read back from there.
    """
    from dgl_jax.run.checkpoint import check_path

    check_path(workdir, "--workdir")
    check_path(workdir / "checkpoints")
    if not holds_checkpoint(workdir):  # nothing would be lost
        return
    changed = differences(load_settings(workdir / "config.json"), settings)
    if changed:
        raise UserError(
            f"--workdir={workdir}: holds a run of another configuration: {'; '.join(changed)}; "
            "use another workdir, or start from its weights with --init_from"
        )


def holds_checkpoint(workdir: Path) -> bool:
    """Tells whether there is something to go on from, whole or not."""
    return bool(_steps(workdir))


def _steps(workdir: Path) -> list[int]:
    from dgl_jax.run.checkpoint import (
        checkpoint_steps,
    )  # here: the command line reads its flags before JAX is imported

    return checkpoint_steps(workdir / "checkpoints")


def finished(workdir: Path, settings: Settings) -> Summary | None:
    """Returns the summary of a run that has nothing left to do under these settings."""
    summary = read_summary(workdir)
    if summary is None or not (workdir / "config.json").exists():
        return None
    before = load_settings(workdir / "config.json").train
    asked = settings.train
    if asked == before or (asked.steps and asked.steps <= summary.steps):
        return summary
    more = asked.epochs > summary.epochs + 1e-3 if not asked.steps else True
    return None if more else summary
