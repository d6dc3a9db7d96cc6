"""Reads the runs below a folder for a report, damaged and unfinished ones as far as possible.

No device is opened, and nothing in the folder of a run raises an exception.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from dgl_jax.config import Settings, make_settings, values_of
from dgl_jax.errors import UserError
from dgl_jax.run.workdir import is_locked, read_json
from dgl_jax.tools.commands import shell_command

# Folders inside a run that hold many files and no runs.
_SKIPPED = ("checkpoints", "plots", "tensorboard")
_METRIC = re.compile(
    r"(train|validation|diagnostics|final)/(module_(\d+)|ensemble)/"
    r"(accuracy|loss|gradient_squared|gradient_second_moment|mmd|wasserstein|weighted_drift"
    r"|codec_error|staleness)"
)
_UNFINISHED = "unfinished"
FINISHED, FAILED, UNREADABLE = "finished", "failed", "cannot be read"
RUNNING, STOPPED = "running", "stopped"
_HUGE = 1e100  # beyond this a number is damaged, and arithmetic with it overflows

# Positions on the horizontal axis and values, of one metric.
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """Content of a run's folder, as far as it can be read.

    Attributes:
      name: path of its folder below the folder of the report; "." for that folder.
      state: "finished", "unfinished", "cannot be read", or the state that a sweep has recorded.
      problem: reason why the run failed or cannot be read; "" if there is none.
      settings: values of the fields that have an effect, by dotted name; empty if unknown.
      command: command line that trains the run; "" if unknown.
      step: newest step in the metrics; 0 before the first.
      total: steps of the whole run; 0 if unknown.
      epoch: newest epoch in the metrics.
      summary: content of `summary.json`; empty if the run is not finished.
      curves: metrics over epochs by (split, module, metric), such as ("train", 0, "loss"); the
        module of the ensemble is -1.
    """

    name: str
    state: str
    problem: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    step: int = 0
    total: int = 0
    epoch: float = 0.0
    summary: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[tuple[str, int, str], Curve] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Returns True if the run has a summary."""
        return self.state == FINISHED

    @property
    def seed(self) -> Any:
        """Returns the seed; None if unknown."""
        return self.settings.get("seed")

    def progress(self) -> str:
        """Returns a text such as "step 20 of 48"; "" if no step is known."""
        if not self.step:
            return ""
        return f"step {self.step:,}" + (f" of {self.total:,}" if self.total else "")


def read_runs(root: Path) -> tuple[list[Run], list[str]]:
    """Reads every run below a folder.

    Args:
      root: folder that is searched at any depth.

    Returns:
      The runs, in the order of a sweep if one has recorded it and by name otherwise; and one line
      for each file of a sweep that cannot be read.
    """
    folders, sweeps, notes = [], [], []
    for path, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIPPED]
        # `--mode=export` writes a config.json of another kind.
        if "config.json" in files and "model.safetensors" not in files:
            folders.append(Path(path))
        if "sweep.json" in files:
            sweeps.append(Path(path))
    recorded: dict[Path, Mapping[str, Any]] = {}
    for folder in sorted(sweeps):
        try:
            rows, swept = read_json(folder / "sweep.json", "rows")["rows"], is_locked(folder)
            recorded |= {
                folder / name: row if swept else row | {"swept": False}
                for name, row in rows.items()
                if _is_row(name, row)
            }
        except (UserError, AttributeError, TypeError) as error:
            notes.append(str(error))
    order = {folder: number for number, folder in enumerate(recorded)}
    folders = sorted(
        {*folders, *recorded}, key=lambda folder: (order.get(folder, math.inf), _natural(folder))
    )
    return [read_run(folder, root, recorded.get(folder, {})) for folder in folders], notes


def read_run(folder: Path, root: Path, row: Mapping[str, Any]) -> Run:
    """Reads one run.

    Args:
      folder: workdir of the run; may be missing if a sweep has not started it.
      root: folder of the report.
      row: what a sweep has recorded about the run, and False as `swept` if that sweep has ended;
        empty without a sweep.
    """
    name = _printable(folder.relative_to(root).as_posix())
    state, problem = str(row.get("state") or _UNFINISHED), str(row.get("error") or "")
    if state == FINISHED:
        state, problem = _UNFINISHED, "summary.json is missing, although a sweep has finished it"
    command = str(row.get("command") or "")
    # `Path.exists` raises in a folder that may not be entered.
    if not os.path.exists(folder / "config.json"):
        if state == RUNNING and not row.get("swept", True):
            state = STOPPED  # before the row had begun
        return Run(name, state, problem, command=command)
    try:
        values = read_json(folder / "config.json")
        settings, described = _settings(values)
    except UserError as error:
        return Run(name, UNREADABLE, _below(error, root), command=command)
    if isinstance(settings, Settings):
        # Not the command of the sweep, which may since ask for more steps.
        command = shell_command(settings, folder)
    records, damage = _records(folder / "metrics.jsonl")
    step, epoch, total = _progress(records, described)
    summary: Mapping[str, Any] = {}
    if os.path.exists(folder / "summary.json"):
        try:
            summary, state, problem = _summary(folder / "summary.json"), FINISHED, damage
        except UserError as error:
            state, problem = UNREADABLE, _below(error, root)
    else:
        problem = problem or damage
        if is_locked(folder):
            state = RUNNING
        elif state == RUNNING:
            state = STOPPED  # with the sweep, which could not record it
    return Run(
        name,
        state,
        problem or ("" if isinstance(settings, Settings) else settings),
        described,
        command,
        step,
        total,
        epoch,
        summary,
        _curves(records),
    )


def number(value: Any) -> float | None:
    """Returns a number of reasonable size, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _HUGE else None


def numbers(value: Any) -> list[float | None]:
    """Returns the numbers of a list, with None for everything else in it."""
    return [number(item) for item in value] if isinstance(value, list) else []


def _is_row(name: str, row: Any) -> bool:
    path = PurePath(name)
    return isinstance(row, dict) and not path.is_absolute() and ".." not in path.parts


def _natural(folder: Path) -> list[tuple[int, str]]:
    """Returns a key that sorts "seed_2" before "seed_10"."""
    parts = re.split(r"(\d+)", str(folder))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _printable(text: str) -> str:
    """Replaces what cannot be written as UTF-8, such as undecodable bytes of file names."""
    return text.encode("utf-8", "replace").decode()


def _below(error: Exception, root: Path) -> str:
    """Returns the text of an error without the folder of the report."""
    return _printable(str(error)).replace(f"{root}/", "")


def _settings(values: dict[str, Any]) -> tuple[Settings | str, dict[str, Any]]:
    """Returns settings, or a line that explains why there are none, and the fields of a run.

    Configurations of other versions, or with plugins that are missing here, are described by what
    the file holds.
    """
    try:
        settings = make_settings(values)
        return settings, {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values_of(settings, effective=True).items()
        }
    except Exception as error:  # a plugin may raise anything
        flat: dict[str, Any] = {}
        for group, value in values.items():
            nested = value if isinstance(value, dict) else {"": value}
            flat |= {f"{group}.{leaf}".rstrip("."): v for leaf, v in nested.items()}
        reason = (str(error) or repr(error)).splitlines()[0]
        return f"no command: {reason}", flat


def _summary(path: Path) -> dict[str, Any]:
    """Reads a summary and checks the fields without which it says nothing.

    Raises:
      UserError: the file cannot be read.
    """
    summary = read_json(path, "modules", "steps")
    modules = summary["modules"]
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise UserError(f"{path}: cannot be read (modules is not a list); restore the file")
    return summary


def _records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the readable records of a run, and a line about unreadable ones.

    The last line of a run that is being written may be incomplete; it is left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return [], ""
    records, damaged = [], []
    for place, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
                continue
        except (ValueError, RecursionError):
            pass
        damaged.append(place)
    return records, f"metrics.jsonl: line {damaged[0]} cannot be read" if damaged else ""


def _progress(records: list[dict[str, Any]], settings: Mapping[str, Any]) -> tuple[int, float, int]:
    """Returns the newest step, its epoch, and the steps of the whole run (0 if unknown)."""
    step, epoch = 0, 0.0
    for record in records:
        at = number(record.get("step"))
        if at is not None and at >= step:
            step, epoch = int(at), number(record.get("epoch")) or epoch
    epochs, total = number(settings.get("train.epochs")), number(settings.get("train.steps"))
    if not total and epochs and epoch:
        total = round(epochs * step / epoch)
    return step, epoch, int(total or 0)


def _curves(records: list[dict[str, Any]]) -> dict[tuple[str, int, str], Curve]:
    """Returns the curves of all modules and of the ensemble, without values that are no numbers."""
    keys = {key: match for record in records for key in record if (match := _METRIC.fullmatch(key))}
    curves: dict[str, Curve] = {key: ([], []) for key in keys}
    for record in records:
        epoch = record.get("epoch")
        place = number(record.get("step", 0) if epoch is None else epoch)
        for key, recorded in record.items():
            if key in curves and place is not None and (value := number(recorded)) is not None:
                curves[key][0].append(place)
                curves[key][1].append(value)
    return {
        (match[1], int(match[3]) if match[3] else -1, match[4]): curves[key]
        for key, match in keys.items()
        if curves[key][0]
    }
