"""Rows and groups of a report.

Runs that differ in nothing but the seed are one row. Rows that differ in one setting stand together
in a group. Plain Python.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from dgl_jax.tools.report_runs import Curve, Run, number, numbers

# Settings that do not influence the results.
_WITHOUT_EFFECT = re.compile(
    r"seed|plugins|checkpoint\..*|log\..*|diagnostics\..*|eval\.every|data\.on_device"
)
# Settings whose change makes accuracies incomparable.
_DATA = re.compile(r"data\.name|data\.dir|task\..*")


@dataclass(frozen=True)
class Value:
    """Mean of a quantity over the runs of a row.

    Attributes:
      mean: the mean.
      deviation: sample standard deviation (n - 1); None for one run.
      count: number of runs n.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed.

    Attributes:
      runs: the runs; each has another seed.
      platform: kind of the devices of the finished runs, such as "cpu"; "" if unknown.
    """

    runs: tuple[Run, ...]
    platform: str = ""

    @cached_property
    def name(self) -> str:
        """Returns the part that the names of the runs share."""
        names = [run.name for run in self.runs]
        shared = os.path.commonprefix(names)  # noqa: RUF071 (names may differ inside a component)
        shared = re.sub(r"[\s_=,./-]*(seed)?[\s_=,./-]*$", "", shared)
        return names[0] if len(names) == 1 else shared or names[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Returns the settings that influence the results, by dotted name."""
        return {
            name: value
            for name, value in self.runs[0].settings.items()
            if not _WITHOUT_EFFECT.fullmatch(name)
        }

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """Returns the finished runs, which alone enter the means."""
        return tuple(run for run in self.runs if run.finished)

    @cached_property
    def modules(self) -> int:
        """Returns the number of modules; 0 if unknown."""
        sizes = [len(run.summary["modules"]) for run in self.finished]
        return max(sizes, default=0) or int(number(self.settings.get("model.modules")) or 0)

    def mean(self, quantity: Callable[[Run], float | None]) -> Value | None:
        """Returns the mean of a quantity; None if no finished run has it."""
        values = [v for run in self.finished if (v := quantity(run)) is not None]
        if not values:
            return None
        return Value(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def accuracy(self, k: int) -> Value | None:
        """Returns the test accuracy of module k, of the last module for -1."""

        def read(run: Run) -> float | None:
            modules = run.summary["modules"]
            return number(modules[k].get("test_accuracy")) if -1 <= k < len(modules) else None

        return self.mean(lambda run: read(run) if run.summary["modules"] else None)

    def ensemble(self) -> Value | None:
        """Returns the test accuracy of all heads together."""
        return self.mean(lambda run: number(run.summary.get("ensemble_accuracy")))

    def speed(self) -> Value | None:
        """Returns the training throughput in images per second."""
        return self.mean(lambda run: number(run.summary.get("images_per_second")))

    def wire(self, down: bool) -> Value | None:
        """Returns the bytes per image that cross all hops, downward or upward."""

        def read(run: Run) -> float | None:
            both = [v or 0.0 for v in numbers(run.summary.get("wire_bytes_per_image"))]
            below = [v or 0.0 for v in numbers(run.summary.get("wire_bytes_down_per_image"))]
            return (sum(below) if down else sum(both) - sum(below)) if both else None

        return self.mean(read)

    def staleness(self) -> Value | None:
        """Returns the mean age of the messages read, of the module where it is largest."""

        def read(run: Run) -> float | None:
            ages = [v for v in numbers(run.summary.get("staleness")) if v is not None]
            return max(ages, default=None)

        return self.mean(read)

    def memory(self) -> tuple[float, str] | None:
        """Returns the largest peak memory of any device, or else of the host, and which it is."""
        peaks = [
            v
            for run in self.finished
            if isinstance(by_device := run.summary.get("peak_memory_bytes"), dict)
            for v in map(number, by_device.values())
            if v is not None
        ]
        if peaks:
            return max(peaks), "device"
        peaks = [
            v
            for run in self.finished
            if (v := number(run.summary.get("peak_host_bytes"))) is not None
        ]
        return (max(peaks), "host") if peaks else None

    def curve(self, split: str, k: int, metric: str) -> Curve | None:
        """Returns the mean curve of the finished runs, or of all runs if none is finished.

        The mean is taken where all of these runs have a value.

        Args:
          split: "train", "validation", "diagnostics" or "final".
          k: module; -1 for the last.
          metric: such as "accuracy" or "loss".
        """
        k = self.modules - 1 if k < 0 else k
        every = [run.curves.get((split, k, metric)) for run in self.finished or self.runs]
        curves = [dict(zip(*curve)) for curve in every if curve]
        if len(curves) < 2:
            return next(filter(None, every), None)
        shared = sorted(set(curves[0]).intersection(*curves[1:]))
        if len(shared) < 2:  # the runs were measured at other epochs
            return sorted(curves[0]), [curves[0][x] for x in sorted(curves[0])]
        return shared, [fmean(curve[x] for curve in curves) for x in shared]

    def state(self) -> str:
        """Returns the states of the runs, such as "finished" or "2 finished, 1 failed"."""
        states = [run.state for run in self.runs]
        if len(set(states)) == 1:
            return states[0]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


@dataclass(frozen=True)
class Group:
    """Rows that stand together.

    Attributes:
      setting: the setting in which they differ; "" for rows that differ in more than one.
      rows: the rows, in the order of the setting's values.
      columns: settings that have several values in the group.
      fixed: settings that have one value in the group and others elsewhere in the report.
    """

    setting: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    fixed: Mapping[str, Any]

    def best(self, value: Callable[[Row], Value | None]) -> frozenset[int]:
        """Returns the places of the rows with the largest mean.

        Empty if all rows are equal, or if they were measured on different data.
        """
        means = {n: number.mean for n, row in enumerate(self.rows) if (number := value(row))}
        if len(set(means.values())) < 2 or any(_DATA.fullmatch(name) for name in self.columns):
            return frozenset()
        return frozenset(n for n, mean in means.items() if mean == max(means.values()))


@dataclass(frozen=True)
class Report:
    """Content of a report.

    Attributes:
      title: folder of the runs.
      runs: all runs.
      groups: groups of the rows whose settings are known.
      shared: settings that are equal in all rows.
      notes: lines about files that cannot be read.
    """

    title: str
    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    shared: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> list[Run]:
        """Returns the runs that are not finished, or have something to report."""
        return [run for run in self.runs if not run.finished or run.problem]

    def states(self) -> dict[str, int]:
        """Returns the number of runs in each state."""
        states = [run.state for run in self.runs]
        return {state: states.count(state) for state in dict.fromkeys(states)}


def make_report(title: str, runs: Sequence[Run], notes: Iterable[str] = ()) -> Report:
    """Groups runs to a report.

    Args:
      title: title of the report.
      runs: all runs, in the order of the report.
      notes: lines about files that cannot be read.
    """
    rows = make_rows([run for run in runs if run.settings])
    names = dict.fromkeys(name for row in rows for name in row.settings)
    varying = [n for n in names if len({_key(row.settings.get(n)) for row in rows}) > 1]
    shared = {n: rows[0].settings.get(n) for n in names if n not in varying}
    # Options that come with a kind are no column beside the kind.
    chosen = [n for n in varying if _differ(rows, n)] or varying
    groups = tuple(_group(part, chosen, rows) for part in _parts(rows, varying, chosen))
    return Report(title, tuple(runs), groups, shared, tuple(notes))


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Joins runs that differ in nothing but the seed.

    Runs on devices of different kinds are different rows. A second run of a seed is a row of its
    own: it is no independent sample.
    """
    rows: dict[tuple[str, str, int], list[Run]] = {}
    waiting: list[tuple[str, Run]] = []
    for run in runs:
        settings = _key(Row((run,)).settings)
        if run.finished:
            _add(rows, settings, _platform(run), run)
        else:
            waiting.append((settings, run))
    for settings, run in waiting:  # their devices are unknown: they join a row of their settings
        platform = next((key[1] for key in rows if key[0] == settings), "")
        _add(rows, settings, platform, run)
    place = {id(run): n for n, run in enumerate(runs)}
    joined = [
        Row(tuple(sorted(members, key=lambda run: place[id(run)])), key[1])
        for key, members in rows.items()
    ]
    return sorted(joined, key=lambda row: place[id(row.runs[0])])


def _add(
    rows: dict[tuple[str, str, int], list[Run]], settings: str, platform: str, run: Run
) -> None:
    copy = 0
    while any(other.seed == run.seed for other in rows.get((settings, platform, copy), ())):
        copy += 1
    rows.setdefault((settings, platform, copy), []).append(run)


def _platform(run: Run) -> str:
    """Returns the kind of the devices of a finished run; "" if it is unknown."""
    if run.summary.get("cpu_threads") is not None:
        return "cpu"
    devices = run.summary.get("peak_memory_bytes")
    return next(iter(devices)).partition(":")[0] if isinstance(devices, dict) and devices else ""


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


# Ends of the settings that choose a kind, which may have settings of its own.
_KINDS = (".name", "model.head", "model.adapter")


def _parts(rows: list[Row], varying: list[str], chosen: list[str]) -> list[tuple[str, list[Row]]]:
    """Divides rows into groups that differ in one setting, the largest first.

    Options that only some kinds have count as part of the setting that chooses the kind. Equally
    large groups: a setting that is a heading already comes first, then the order of the
    configuration decides. Rows without a partner come last, together.

    Args:
      rows: all rows.
      varying: settings that are not the same in all rows.
      chosen: settings among them that may be a heading.
    """
    partial = {n for n in varying if any(n not in row.settings for row in rows)}
    kinds = [n for n in varying if n.endswith(_KINDS)]

    def kinds_of(row: Row, setting: str) -> str:
        return _key({n: row.settings.get(n) for n in kinds if n != setting})

    # By setting and the other kinds of a row: the options that rows with these kinds may lack.
    lacking: dict[tuple[str, str], set[str]] = {}
    for setting in kinds:
        for row in rows:
            lacking.setdefault((setting, kinds_of(row, setting)), set()).update(
                n for n in partial if n not in row.settings
            )

    def remainder(row: Row, setting: str) -> str:
        missing = lacking.get((setting, kinds_of(row, setting)), set())
        return _key({n: row.settings.get(n) for n in varying if n not in {setting} | missing})

    parts: list[tuple[str, list[Row]]] = []
    left = list(rows)
    while left:
        classes: dict[tuple[str, str], list[Row]] = {}
        for setting in chosen:
            for row in left:
                classes.setdefault((setting, remainder(row, setting)), []).append(row)
        used = [setting for setting, _ in parts]
        choice = max(
            (key for key, members in classes.items() if _differ(members, key[0])),
            key=lambda key: (len(classes[key]), key[0] in used, -chosen.index(key[0])),
            default=None,
        )
        if choice is None:
            return [*parts, ("", left)]
        parts.append((choice[0], classes[choice]))
        left = [row for row in left if row not in classes[choice]]
    return parts


def _differ(rows: list[Row], setting: str) -> bool:
    """Returns True if the rows that have a setting have several values of it."""
    return len({_key(row.settings[setting]) for row in rows if setting in row.settings}) > 1


def _group(part: tuple[str, list[Row]], chosen: list[str], all_rows: list[Row]) -> Group:
    setting, rows = part
    columns = [n for n in chosen if _differ(rows, n)]
    columns.sort(key=lambda n: n != setting)
    fixed = {
        n: rows[0].settings[n]
        for n in chosen
        if n not in columns and n in rows[0].settings and _differ(all_rows, n)
    }
    if setting:
        keys = [_order(rows, name) for name in columns]
        rows = sorted(rows, key=lambda row: [key(row) for key in keys])
    return Group(setting, tuple(rows), tuple(columns), fixed)


def _order(rows: list[Row], name: str) -> Callable[[Row], tuple[int, float]]:
    """Returns a key that sorts rows by a setting: numbers by size, others as they appear."""
    keys = list(dict.fromkeys(_key(row.settings.get(name)) for row in rows))

    def key(row: Row) -> tuple[int, float]:
        value = row.settings.get(name)
        size = number(value)
        return (1, keys.index(_key(value))) if size is None else (0, size)

    return key
