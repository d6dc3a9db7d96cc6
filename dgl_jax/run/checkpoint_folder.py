"""Checkpoint folders as plain files: path checks, listing, one-line errors. No JAX, no Orbax."""

import json
import logging
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgl_jax.errors import UserError, explain, is_disk_full, of_a_path

_LOG = logging.getLogger(__name__)

# Orbax finds its files by globbing its path: these characters would make the path itself a pattern.
_PATTERN = "[]*?\\"
_REFUSED = re.compile("Permission denied|PERMISSION_DENIED|Read-only file system|Not a directory")


def check_path(directory: Path, flag: str = "") -> None:
    """Checks that checkpoints written below this folder can be read back.

    Args:
      directory: folder of the checkpoints, or the workdir that contains it.
      flag: flag that the user gave the folder with, such as `--workdir`, for the message.

    Raises:
      UserError: the absolute path contains characters that Orbax cannot read, or it is a file.
    """
    path = directory.absolute()
    text, name = str(path), f"{flag}={directory}" if flag else str(path)
    wrong = next((c for c in text if c in _PATTERN), "gs:/" if "gs:/" in text else "")
    # Lone surrogates are how Python represents undecodable bytes of a path.
    if any("\ud800" <= c <= "\udfff" for c in text):
        wrong = "bytes that are not UTF-8"
    if wrong:
        name += "" if directory.is_absolute() else f" (that is {text})"
        raise UserError(
            f"{name}: checkpoints under a path with {wrong} cannot be read back; "
            "use another path (a symbolic link to this folder works)"
        )
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{name}: is a file but must be a folder; move it away, or use another --workdir"
        )


def is_checkpoint(path: Path) -> bool:
    """Returns True if `path` is a checkpoint, intact or damaged.

    A checkpoint is a folder that is named by its step and not empty.
    """
    try:
        return path.name.isdecimal() and str(int(path.name)) == path.name and any(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def mend_accuracy(folder: Path, accuracy: float | None) -> None:
    """Makes the file from which Orbax reads the accuracy of a checkpoint agree with the metadata.

    It has no checksum, and Orbax keeps or deletes checkpoints by it. Without an accuracy it is
    removed.

    Args:
      folder: the checkpoint.
      accuracy: accuracy in the metadata; None if there is none or they are damaged.
    """
    path = folder / "metrics" / "metrics"
    if not path.parent.exists():
        return
    try:
        if json.loads(path.read_bytes()) == {"accuracy": accuracy}:
            return
    except (OSError, ValueError):
        pass
    _LOG.warning("%s: is damaged, and replaced by what the metadata say", path)
    if accuracy is None:
        shutil.rmtree(path.parent)
    else:
        path.write_text(json.dumps({"accuracy": accuracy}), encoding="utf-8")


def checkpoint_steps(directory: Path) -> list[int]:
    """Lists the steps of the checkpoints in a folder in ascending order."""
    try:
        return sorted(int(path.name) for path in directory.iterdir() if is_checkpoint(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def move(path: Path, target: Path) -> None:
    """Moves a file or folder to `target`, replacing what is there."""
    target.parent.mkdir(exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    path.rename(target)


@contextmanager
def write_errors(directory: Path) -> Iterator[None]:
    """Turns a full disk or a folder without write access into a one-line error.

    The storage layer below Orbax raises such failures as many different exceptions.

    Args:
      directory: folder to name in the message.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"{directory}: the disk is full; free some space and run the same command again"
            ) from error
        refusal = _REFUSED.search(str(error))
        reason = (
            error.strerror
            if isinstance(error, OSError) and of_a_path(error)
            else refusal and refusal[0]
        )
        if reason:
            raise UserError(f"{directory}: cannot write there ({reason})") from error
        raise


_quiet = threading.Lock()


def _without_closed_loops(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook that ignores reads which end after their event loop is closed."""
    if getattr(hook, "hides_closed_loops", False):
        return hook

    def chosen(*args: Any) -> None:
        error = args[1] if len(args) > 1 else args[0].exc_value
        if str(error) != "Event loop is closed":
            hook(*args)

    chosen.hides_closed_loops = True  # type: ignore[attr-defined]
    return chosen


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what the storage layer below Orbax prints around a read that failed.

    Its other reads end after their event loop is closed. Each of them prints a traceback through
    `sys.excepthook`, or a warning when it is collected, which stays hidden; the failure itself is
    an exception. Some of these tracebacks come later, so that this error stays hidden afterwards. A
    second thread in such a block does not hide anything.
    """
    warnings.filterwarnings("ignore", "coroutine '(PyTreeHandler|Store)", RuntimeWarning)
    if not _quiet.acquire(blocking=False):
        yield
        return
    hooks = _without_closed_loops(sys.excepthook), _without_closed_loops(sys.unraisablehook)
    sys.excepthook, sys.unraisablehook = (lambda *_: None), (lambda _: None)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        _quiet.release()


def first_line(error: BaseException) -> str:
    """Returns the first line of the text of an exception's cause, shortened, or else its type."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_file_intact(error: BaseException) -> bool:
    """Returns True if reading a checkpoint failed for another reason than its being damaged."""
    return isinstance(error, PermissionError) or (
        not isinstance(error, OSError) and explain(error) is not None
    )
