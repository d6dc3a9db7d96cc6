"""Estimates of the time and the disk space that the rows of a sweep need, and their progress."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgl_jax.config import Settings
from dgl_jax.run import workdir
from dgl_jax.run.summary import Summary, read_summary
from dgl_jax.run.writers import write_text
from dgl_jax.tools.jobs import Job
from dgl_jax.tools.rows import Row

_STEPS = 5  # timed steps of a measurement
BUDGET = 120.0  # seconds after which no further kind of row is measured
_TAIL = 1 << 18  # bytes at the end of metrics.jsonl in which a whole line is expected
# Fields that change neither the time of a step nor the size of a checkpoint.
_IRRELEVANT: dict[str, tuple[str, ...] | None] = {
    "seed": None,
    "schedule": None,
    "checkpoint": ("every", "keep"),
    "eval": None,
    "log": None,
    "diagnostics": None,
    "optimizer": ("learning_rate", "weight_decay", "momentum"),
    "train": ("epochs", "steps", "label_smoothing"),
}


@dataclass(frozen=True)
class Cost:
    """Costs of the runs of one kind.

    Attributes:
      step: seconds per update of all modules.
      start: seconds before the first step.
      steps_per_epoch: updates per module in one epoch.
      checkpoint: bytes of a checkpoint.
    """

    step: float
    start: float
    steps_per_epoch: float
    checkpoint: int


def kind_of(settings: Settings) -> str:
    """Returns a text that is equal for runs whose steps take the same time."""
    values = settings.to_dict()
    for group, fields in _IRRELEVANT.items():
        if fields is None:
            values.pop(group)
        else:
            values[group] = {k: v for k, v in values[group].items() if k not in fields}
    return json.dumps(values, sort_keys=True)


def total_steps(settings: Settings, steps_per_epoch: float) -> int:
    """Returns the updates per module of a whole run."""
    return settings.train.steps or round(settings.train.epochs * steps_per_epoch)


class Costs:
    """Costs by kind of row, from finished rows and from measurements."""

    def __init__(self) -> None:
        self._known: dict[str, Cost] = {}

    def learn(self, row: Row) -> None:
        """Takes the costs from the summary of a finished row."""
        summary = read_summary(row.folder)
        if summary is not None and summary.steps and summary.epochs:
            self._known[kind_of(row.settings)] = _measured(row, summary)

    def observe(self, row: Row, step: float, steps_per_epoch: float) -> None:
        """Replaces the time of a step by that of a running row.

        Args:
          row: the row.
          step: seconds per step.
          steps_per_epoch: updates per module in one epoch.
        """
        cost = self.of(row) or Cost(step, 0.0, steps_per_epoch, 0)
        self._known[kind_of(row.settings)] = dataclasses.replace(cost, step=step)

    def measure(self, row: Row, flags: Sequence[str], run: Callable[[list[str], Path], Job]) -> str:
        """Measures some steps of a row in a child process.

        Args:
          row: the row.
          flags: flags of all child processes.
          run: starts a child with given flags and log file, and waits for its end.

        Returns:
          "", or the last line of the error.
        """
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--mode=bench", f"--bench_steps={_STEPS}", "--nobench_modules", *flags]
            job = run([*flags, store_config(row.settings, Path(folder))], Path(folder, "log.txt"))
            if job.poll() != 0:
                return job.error()
            numbers = json.loads(next(line for line in job.lines() if line.startswith("{")))
        step = numbers["tick_milliseconds"] / 1e3
        self._known[kind_of(row.settings)] = Cost(
            step,
            max(0.0, job.seconds() - _STEPS * step),
            numbers["steps_per_epoch"],
            numbers["checkpoint_bytes"],
        )
        return ""

    def of(self, row: Row) -> Cost | None:
        """Returns the costs of a row's kind; None if they are unknown."""
        return self._known.get(kind_of(row.settings))

    def unknown(self, rows: Iterable[Row]) -> list[Row]:
        """Returns one row of each kind whose costs are unknown."""
        first = {kind_of(row.settings): row for row in reversed(list(rows))}
        return [row for kind, row in reversed(first.items()) if kind not in self._known]

    def seconds(self, rows: Sequence[Row], jobs: int) -> float | None:
        """Estimates the seconds until all rows are finished.

        Args:
          rows: rows that are not finished; kinds of unknown cost count as the mean of the others.
          jobs: number of rows that run at the same time.

        Returns:
          The estimate; None if the cost of no row is known.
        """
        known = [cost for row in rows if (cost := self._left(row)) is not None]
        if not known:
            return None
        total = sum(known) * len(rows) / len(known)
        return max(total / min(jobs, len(rows)), *known)

    def disk(self, rows: Iterable[Row]) -> int | None:
        """Estimates the bytes of all checkpoints that rows will keep, as `seconds` does."""
        rows = list(rows)
        sizes = [
            cost.checkpoint * (row.settings.checkpoint.keep + 1)  # and the best one on validation
            for row in rows
            if (cost := self.of(row)) is not None
        ]
        return round(sum(sizes) * len(rows) / len(sizes)) if sizes else None

    def _left(self, row: Row) -> float | None:
        cost = self.of(row)
        if cost is None:
            return None
        left = total_steps(row.settings, cost.steps_per_epoch) - newest_step(row.folder)
        return cost.start + max(0, left) * cost.step


def _measured(row: Row, summary: Summary) -> Cost:
    """Returns the costs of a finished row; its evaluations are included in the time of a step."""
    folders = [path for path in (row.folder / "checkpoints").glob("*") if path.name.isdecimal()]
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in folders
    ]
    return Cost(
        summary.wall_seconds / summary.steps,
        0.0,
        summary.steps / summary.epochs,
        max(sizes, default=0),
    )


def store_config(settings: Settings, folder: Path) -> str:
    """Stores a configuration as `config.json` in a folder; returns the flag that loads it."""
    write_text(folder / "config.json", json.dumps(settings.to_dict()) + "\n")
    return f"--config={workdir.__file__}:{folder}"


def newest_record(folder: Path) -> dict[str, Any] | None:
    """Returns the newest record of a run's metrics.jsonl; None if there is none."""
    with suppress(OSError), open(folder / "metrics.jsonl", "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        for line in reversed(file.read().split(b"\n")):
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("epoch"):
                    return record
    return None


def newest_step(folder: Path) -> int:
    """Returns the newest step in a run's metrics.jsonl; 0 if there is none."""
    return (newest_record(folder) or {"step": 0})["step"]


@dataclass
class Meter:
    """Progress of a running row, read from its metrics.jsonl.

    Attributes:
      row: the row.
      step: newest step.
      total: updates per module at the end; None if unknown.
      rate: steps per second since the start of this process; None if unknown.
      steps_per_epoch: updates per module in one epoch.
    """

    row: Row
    step: int = 0
    total: int | None = None
    rate: float | None = None
    steps_per_epoch: float = 0.0
    _first: dict[str, Any] | None = dataclasses.field(default=None, repr=False)

    def read(self, since: float) -> None:
        """Reads the newest record.

        Args:
          since: Unix seconds of the start of the process; older records belong to an earlier one.
        """
        record = newest_record(self.row.folder)
        if record is None or record["time"] < since:
            return
        self.step = record["step"]
        self.steps_per_epoch = record["step"] / record["epoch"]
        self.total = total_steps(self.row.settings, self.steps_per_epoch)
        first = self._first = self._first or record
        if record["step"] > first["step"] and record["time"] > first["time"]:
            self.rate = (record["step"] - first["step"]) / (record["time"] - first["time"])

    def seconds(self) -> float | None:
        """Returns the estimated seconds until the last step; None if unknown."""
        if self.rate is None or self.total is None:
            return None
        return max(0, self.total - self.step) / self.rate


def spoken(seconds: float) -> str:
    """Formats a duration for people, such as "3 h 10 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
