"""Where the numbers of a run go: JSON lines, TensorBoard, and the eyes of whoever waits.

The method names are those of clu's metric writers (whose package needs TensorFlow): `write_scalars`, `flush`, `close`.
"""

import contextlib
import datetime
import errno
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from dgl_jax.errors import UserError, is_disk_full

_LOG = logging.getLogger(__name__)

_ACCURACY = re.compile(r"(train|validation|test)/(?:module_(\d+)|ensemble)/accuracy")
_AGE = re.compile(r"replay/module_(\d+)/age")
_RATE = re.compile(r"work/module_(\d+)/updates_per_second")
_ASYNCHRONOUS = re.compile(r"(?:replay|work)/module_(\d+)/")
_SHOWN = {"train": "train", "validation": "val", "test": "test"}
Scalars = Mapping[str, SupportsFloat]
Turns = Sequence[tuple[int, float, float]]  # (module, begin, end)


class Writer(Protocol):
    """Takes what was measured at `step` updates a module; `epoch` may stand among the scalars instead.

    Turns are which module worked when: (module, begin, end) in `unit`.
    """

    def write_scalars(self, step: int, scalars: Scalars, epoch: float | None = None) -> None: ...

    def write_turns(self, step: int, turns: Turns, unit: str) -> None: ...

    def flush(self) -> None: ...

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
        self._write({"step": int(step), "epoch": given if epoch is None else _finite(epoch), "time": self._clock()} | values)

    def write_turns(self, step: int, turns: Turns, unit: str) -> None:
        rounded = [[k, round(begin, 6), round(end, 6)] for k, begin, end in turns]
        self._write({"step": int(step), "time": self._clock(), "unit": unit, "turns": rounded})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
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

    def flush(self) -> None:
        self._writer.flush()

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

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

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
    kept = [line for line, record in lines if record.get("step", 0) <= step and not unwanted(record)]
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
            raise UserError(f"{what}: the disk is full; free some space and run the same line again") from error
        raise UserError(f"{what}: cannot write there ({error.strerror or error}); choose a place that can be written") from error


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
    numbered = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
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


class StderrHandler(logging.StreamHandler):
    """Log lines to whatever `sys.stderr` is when they come: while a bar is drawn, to the stream that puts them above it."""

    @property
    def stream(self) -> Any:
        """The current standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


def log_to_stderr() -> None:
    """Shows what the package logs, as lines with the time of day; the command line calls this, the package never does."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dgl_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    for other in logging.getLogger().handlers:  # what the libraries say: warnings only
        other.setLevel(logging.WARNING)
        other.addFilter(lambda record: record.name not in ("absl", "asyncio"))  # Orbax logs in full what it raises anyway


class Progress(contextlib.AbstractContextManager):
    """What a waiting person sees: a bar with accuracies and ETA on a terminal, a log line an update elsewhere.

    Every `update` is shown, so the caller's log events set the pace. Elsewhere the lines need the logger's level INFO.
    `console` is where to draw (default: standard error) and tells whether there is a terminal; `clock` gives seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console or Console(stderr=True), clock
        self._marks: deque[tuple[float, int]] = deque()  # (time, step)
        self._total = self._step = self._advances = 0
        self._status: dict[str, str] = {}
        self._live: Live | None = None

    def start(self, total_steps: int, done: int = 0) -> None:
        """Begins at `done` of `total_steps` updates a module; only the rest counts for speed and ETA."""
        self.close()
        self._total, self._step, self._advances = total_steps, done, 0
        self._marks = deque([(self._clock(), done)], maxlen=64)  # long enough to hold evaluations too
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._picture, refresh_per_second=2)
            self._live.start()

    def update(self, step: int, scalars: Scalars) -> None:
        """Shows that every module has done `step` updates, with the accuracies and the speed among `scalars`."""
        if self._marks and step > self._marks[-1][1]:
            self._marks.append((self._clock(), step))
            self._advances += 1
            if self._advances == 2:
                self._marks.popleft()  # the first stretch, from `start`, held the compilation
        self._step, news = step, status(scalars)
        self._status |= news
        if self._live:
            return self._live.refresh()
        epoch = [f"epoch {float(scalars['epoch']):.2f}"] if "epoch" in scalars else []
        _LOG.info("%s", " | ".join([f"step {step}/{self._total}", *epoch, *news.values(), self._left()]))

    def eta(self) -> float | None:
        """Seconds until the last step, judged by the latest updates; None while all that is known has compilation in it."""
        if self._advances < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return max(0.0, end + max(0, self._total - last) * (end - start) / (last - first) - self._clock())

    def message(self, text: str) -> None:
        """Prints a line above the bar, or logs it."""
        if self._console.is_terminal:
            self._console.print(Text(text))
        else:
            _LOG.info("%s", text)

    def close(self) -> None:
        """Leaves the bar as it stands; a second call does nothing."""
        if self._live:
            self._live.stop()
            self._live = None

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _left(self) -> str:
        return "ETA -" if (eta := self.eta()) is None else f"ETA {datetime.timedelta(seconds=round(min(eta, 1e9)))}"

    def _picture(self) -> Group:
        """The bar, and below it the accuracies, which need more room the more modules there are."""
        row = Table.grid(Column(ratio=1), Column(no_wrap=True), expand=True, padding=(0, 1))
        row.add_row(ProgressBar(max(1, self._total), self._step), f"{self._step}/{self._total} {self._left()}")
        return Group(
            row, Text(" | ".join(self._status[kind] for kind in (*_SHOWN, "age", "rate", "speed") if kind in self._status))
        )


def status(scalars: Scalars) -> dict[str, str]:
    """Short texts by kind: {'train': 'train 0.91 0.95', 'validation': 'val 0.90 (ensemble 0.95)', 'speed': ...}."""
    heads: dict[str, list[tuple[float, str]]] = {}
    for key, value in scalars.items():
        if found := _ACCURACY.fullmatch(key):
            split, module = found.groups()
            text = f"{float(value):.2f}"
            heads.setdefault(split, []).append((int(module), text) if module else (math.inf, f"(ensemble {text})"))
    # In asynchronous training a module may have made no update lately: its place stays.
    modules = {int(found[1]) for key in scalars if (found := _ASYNCHRONOUS.match(key))}
    if "train" in heads:
        there = {k for k, _ in heads["train"]}
        heads["train"] += [(k, "-") for k in range(max(modules, default=-1) + 1) if k not in there]
    texts = {s: " ".join([_SHOWN[s], *(text for _, text in sorted(heads[s]))]) for s in _SHOWN if s in heads}
    ages = sorted((int(found[1]), float(v)) for key, v in scalars.items() if (found := _AGE.fullmatch(key)))
    if ages:
        texts["age"] = " ".join(["age", *(f"{age:.1f}" for _, age in ages)])
    rates = sorted((int(found[1]), float(v)) for key, v in scalars.items() if (found := _RATE.fullmatch(key)))
    if rates:
        texts["rate"] = " ".join([*(f"{rate:.1f}" for _, rate in rates), "updates/s"])
    if "images_per_second" in scalars:
        texts["speed"] = f"{float(scalars['images_per_second']):,.0f} images/s"
    return texts
