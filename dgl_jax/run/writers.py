"""Metric writers (JSON lines, TensorBoard), and atomic file writing with one-line errors.

The writers have the method names of clu's metric writers, whose package needs TensorFlow.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from dgl_jax.errors import UserError, is_disk_full

_LOG = logging.getLogger(__name__)

Scalars = Mapping[str, SupportsFloat]
Turns = Sequence[tuple[int, float, float]]  # (module, begin, end)


class Writer(Protocol):
    """Interface of a destination for the metrics of a run."""

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        """Writes metrics that were measured after `step` updates per module.

        Args:
          step: updates per module.
          scalars: metrics by name; may contain `epoch` instead of the argument.
          epoch: number of epochs at this step, if known.
        """

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        """Writes which module worked when.

        Args:
          step: updates per module.
          turns: turns as (module, begin, end).
          unit: unit of `begin` and `end`, such as "seconds".
        """

    def close(self) -> None:
        """Writes everything to its destination and closes it."""


class JsonLinesWriter:
    """Writer that appends one JSON object per line to a file.

    An object holds `step`, `epoch` (null if unknown), `time` (Unix seconds) and the scalars. NaN
    and infinity do not exist in JSON and become null. Every line is flushed, so that a killed
    process loses at most the line it was writing; the next writer removes such an incomplete line.

    Args:
      path: the file; missing folders above it are created.
      clock: returns the value of `time`.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate(path, math.inf)
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        values = {key: _finite(value) for key, value in scalars.items()}
        epoch_in_scalars = values.pop("epoch", None)
        self._write(
            {
                "step": int(step),
                "epoch": epoch_in_scalars if epoch is None else _finite(epoch),
                "time": self._clock(),
            }
            | values
        )

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        rounded = [[k, round(begin, 6), round(end, 6)] for k, begin, end in turns]
        self._write({"step": int(step), "time": self._clock(), "unit": unit, "turns": rounded})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Writer of TensorBoard event files through tensorboardX.

    A thread of tensorboardX writes every ten seconds; `close` waits for it. Metrics `final/`, which
    compare all steps with the last one, are a run of their own in the folder `final`, which is
    written again if training goes further.

    Args:
      directory: folder of the event files.
      resumed_at: step of the checkpoint that the run resumed from; 0 if it begins, None if nothing
        was written before. TensorBoard hides what was written for later steps.
    """

    def __init__(self, directory: str | os.PathLike[str], resumed_at: int | None = None):
        from tensorboardX import SummaryWriter  # here: an optional dependency

        # `purge_step` also hides the step itself, whose records are still valid.
        purge = resumed_at + 1 if resumed_at else resumed_at
        self._writer = SummaryWriter(os.fspath(directory), purge_step=purge, flush_secs=10)
        self._final = Path(directory) / "final"
        self._final_writer: Any = None

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        writer = self._writer
        if any(key.startswith("final/") for key in scalars):
            if self._final_writer is None:
                shutil.rmtree(self._final, ignore_errors=True)
                self._final_writer = type(writer)(os.fspath(self._final))
            writer = self._final_writer
        for key, value in (scalars if epoch is None else {**scalars, "epoch": epoch}).items():
            writer.add_scalar(key, float(value), int(step))

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        """Does nothing: TensorBoard has no display for turns."""

    def close(self) -> None:
        self._writer.close()
        if self._final_writer is not None:
            self._final_writer.close()


class MultiWriter:
    """Writer that forwards everything to each of `writers`; without any it discards everything."""

    def __init__(self, writers: Iterable[Writer]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars, epoch)

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        for writer in self._writers:
            writer.write_turns(step, turns, unit)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # closes the others even if one fails
            for writer in self._writers:
                stack.callback(writer.close)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines file.

    An incomplete last line, left by a killed process, is ignored.

    Raises:
      UserError: another line is not a JSON object.
    """
    return [record for _, record in _lines(Path(path))]


def truncate(path: str | os.PathLike[str], step: float, without: str | tuple[str, ...] = "") -> int:
    """Removes records after `step` and an incomplete last line from a JSON-lines file.

    The file is replaced atomically, so no writer may have it open.

    Args:
      path: the file; a missing one is left missing.
      step: last step to keep.
      without: also remove records with a key that starts with this prefix, or one of them.

    Returns:
      The number of complete records removed.
    """
    path = Path(path)
    lines = _lines(path) if path.exists() else []

    def unwanted(record: dict[str, Any]) -> bool:
        return bool(without) and any(key.startswith(without) for key in record)

    remaining = [
        line for line, record in lines if record.get("step", 0) <= step and not unwanted(record)
    ]
    content = b"".join(line + b"\n" for line in remaining)
    if path.exists() and content != path.read_bytes():
        write_atomically({path: content})
    return len(lines) - len(remaining)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically in UTF-8; undecodable bytes of file names are restored."""
    write_atomically({path: _encoded(text)})


def write_stdout(text: str) -> None:
    """Writes to standard output the bytes that `write_text` writes, independent of the locale.

    Does nothing if standard output is closed, or if its reader has ended.
    """
    if sys.stdout is None or getattr(sys.stdout, "closed", False):
        return
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:  # not a file but the stream of a notebook or a test
        sys.stdout.write(text)
        return
    try:
        sys.stdout.flush()
        stream.write(_encoded(text))
        stream.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends.
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Turns failures to write inside a `with` block into one-line errors.

    Args:
      name: what is written, such as `--output=labels.csv`; the message starts with it.

    Raises:
      UserError: the disk is full, or the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{name}: the disk is full; free some space and run the same command again"
            ) from error
        raise UserError(
            f"{name}: cannot write there ({error.strerror or error}); choose a writable place"
        ) from error


def check_writable(path: Path, name: str, folder: bool = False) -> None:
    """Checks that a file can be written, before the work that produces its content.

    Creates nothing.

    Args:
      path: the file, or the folder of the files; it and the folders above it may be missing.
      name: name for the message, see `writing`.
      folder: True if `path` is a folder.

    Raises:
      UserError: it cannot be written.
    """
    with writing(name):
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        place = path if folder else path.parent
        place = next(p for p in (place, *place.parents) if os.path.lexists(p))
        with tempfile.TemporaryFile(dir=place):
            pass


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Replaces files atomically: after a crash or on a full disk each has its old or new content.

    All new contents are written before the first file is replaced. Missing folders are created.
    File permissions follow the umask.

    Args:
      files: content by path.
    """
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
    # A short fixed name: a suffix could make the longest allowed file name too long.
    scratch = {path: path.with_name(f".dgl_jax.{os.getpid()}.{n}") for n, path in enumerate(files)}
    try:
        for path, content in files.items():
            with scratch[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in scratch.items():
            temporary.replace(path)
    finally:
        for temporary in scratch.values():
            temporary.unlink(missing_ok=True)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns every complete line with its record."""
    numbered = [
        (n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
    ]
    result = []
    for number, line in numbered:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step", 0), int | float):
            result.append((line, record))
        elif number != numbered[-1][0]:
            raise UserError(f"{path}, line {number}: not a record; repair or remove the line")
    return result


def _finite(value: SupportsFloat) -> float | None:
    return number if math.isfinite(number := float(value)) else None
