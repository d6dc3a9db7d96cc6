"""Where the numbers of a run go: JSON lines, TensorBoard, and the eyes of whoever waits.

The method names are those of clu's metric writers (whose package needs TensorFlow): `write_scalars`, `close`.
"""

import contextlib
import errno
import json
import logging
import math
import os
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
    """Takes what was measured at `step` updates a module; `epoch` may stand among the scalars instead.

    Turns are which module worked when: (module, begin, end) in `unit`.
    """

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None: ...

    def write_turns(self, step: int, turns: Turns, unit: str) -> None: ...

    def close(self) -> None: ...


class JsonLinesWriter:
    """Appends one JSON object a line: `step`, `epoch` (null where unknown), `time` (unix seconds), then the scalars.

    JSON knows neither NaN nor infinity: both are written as null. Every line is flushed, so a killed run loses at most
    the line it was writing; what is left of such a line is removed when the file is opened again.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate(path, math.inf)
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        values = {key: _finite(value) for key, value in scalars.items()}
        given = values.pop("epoch", None)
        self._write(
            {
                "step": int(step),
                "epoch": given if epoch is None else _finite(epoch),
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
    """Event files for TensorBoard, through tensorboardX, which is imported when the first of these is made.

    With `resumed_at`, a checkpoint's step, TensorBoard hides what an earlier attempt wrote after that step. A thread
    writes every ten seconds; tensorboardX's `flush` does not wait for it, `close` does.
    """

    def __init__(self, directory: str | os.PathLike[str], resumed_at: int | None = None):
        from tensorboardX import SummaryWriter

        # purge_step hides the step itself too, whose records are kept here as they are in metrics.jsonl.
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(os.fspath(directory), purge_step=purge, flush_secs=10)

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        for key, value in (scalars if epoch is None else {**scalars, "epoch": epoch}).items():
            self._writer.add_scalar(key, float(value), int(step))

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        """Nothing: TensorBoard has no picture for them."""

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Hands everything to each of `writers`; with none of them it is the writer of a process that writes nothing."""

    def __init__(self, writers: Iterable[Writer]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars, epoch)

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        for writer in self._writers:
            writer.write_turns(step, turns, unit)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # closes the others even where one fails
            for writer in self._writers:
                stack.callback(writer.close)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, without a last line that was torn by the end of its process.

    Raises:
      UserError: a line other than the last is not a JSON object.
    """
    return [record for _, record in _lines(Path(path))]


def truncate(path: str | os.PathLike[str], step: float, without: str = "") -> int:
    """Cuts a JSON-lines file back to its records up to `step`, that step included, and drops a torn last line.

    Replaces the file in one piece: call it before a writer opens it. `without` names the beginning of keys whose records go too.
    Returns how many whole records were dropped.
    """
    path = Path(path)
    lines = _lines(path) if path.exists() else []
    unwanted = lambda record: bool(without) and any(key.startswith(without) for key in record)  # noqa: E731
    kept = [
        line for line, record in lines if record.get("step", 0) <= step and not unwanted(record)
    ]
    content = b"".join(line + b"\n" for line in kept)
    if path.exists() and content != path.read_bytes():
        write_atomically({path: content})
    return len(lines) - len(kept)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_atomically` does, in UTF-8; bytes of file names that are not UTF-8 come out as they were."""
    write_atomically({path: _encoded(text)})


def write_stdout(text: str) -> None:
    """Writes to standard output the bytes that `write_text` writes to a file, whatever the locale."""
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:  # not a file: a notebook's, or a test's
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    stream.write(_encoded(text))
    stream.flush()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns a failure to write inside the block into a UserError that begins with `what`, such as `--output=labels.csv`."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{what}: the disk is full; free some space and run the same line again"
            ) from error
        raise UserError(
            f"{what}: cannot write there ({error.strerror or error}); choose a place that can be written"
        ) from error


def check_writable(path: Path, what: str, folder: bool = False) -> None:
    """Checks that a file can be written, before the work whose result it is to hold. Leaves no trace.

    Args:
      path: the file, or the folder that files will be written into; it and folders above it may be missing.
      what: as for `writing`.
      folder: whether `path` is the folder.

    Raises:
      UserError: it cannot.
    """
    with writing(what):
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        place = path if folder else path.parent
        place = next(each for each in (place, *place.parents) if os.path.lexists(each))
        with tempfile.TemporaryFile(dir=place):
            pass


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Each file whole or, after a crash or on a full disk, as it was before; all are written before the first is replaced.

    Folders above them are made. Plain files: the umask decides who may read them.
    """
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
    # A name of its own length: with something added to it, the longest would be too long.
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
    """Each whole line with its record."""
    numbered = [
        (n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
    ]
    result = []
    for number, line in numbered:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            result.append((line, record))
        elif number != numbered[-1][0]:
            raise UserError(f"{path}, line {number}: not a JSON object; mend or remove the line")
    return result


def _finite(value: SupportsFloat) -> float | None:
    return number if math.isfinite(number := float(value)) else None
