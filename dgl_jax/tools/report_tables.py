"""Tables of a report as cells of text, and their form in Markdown."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgl_jax.tools.report_groups import Group, Report, Row, Value
from dgl_jax.tools.report_runs import Run

NONE = "\N{EN DASH}"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
      text: what is shown.
      sort: number by which a column is sorted; None to sort by the text.
      best: True for the best value of its column.
      hint: longer text, shown on demand; may be empty.
    """

    text: str
    sort: float | None = None
    best: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Column:
    """Head of a column.

    Attributes:
      title: its title.
      number: True if its cells are numbers, which are aligned to the right.
    """

    title: str
    number: bool = True


Table = tuple[list[Column], list[list[Cell]]]


def bytes_text(value: float) -> str:
    """Returns a number of bytes for people, such as "12.8 MiB"."""
    unit = 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.1f} {_UNITS[unit]}" if unit else f"{value:,.0f} B"


def setting_text(value: Any) -> str:
    """Returns a value in the form in which the command line reads it."""
    if isinstance(value, list):
        return f"({','.join(map(setting_text, value))})"
    return NONE if value is None else str(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Returns settings as "a.b=value, ..."."""
    return ", ".join(f"{name}={setting_text(value)}" for name, value in settings.items())


def heading(group: Group) -> str:
    """Returns the heading of a group."""
    if group.setting:
        return f"By {group.setting}"
    return "Rows that differ in several settings" if len(group.rows) > 1 else "Single row"


def labels(group: Group) -> list[str]:
    """Returns a label of every row that is unique in its group."""
    short = [
        ", ".join(
            f"{_leaf(name)}={setting_text(row.settings[name])}"
            for name in group.columns
            if name in row.settings
        )
        for row in group.rows
    ]
    clear = len(set(short)) == len(short) and all(1 <= len(label) <= 70 for label in short)
    return short if clear else [row.name for row in group.rows]


def results(group: Group) -> Table:
    """Returns the main table of a group: one row per row of the report.

    The names of the runs, which may be long, come first only if nothing else identifies a row.
    """
    best_last, best_all = group.best(lambda row: row.accuracy(-1)), group.best(Row.ensemble)
    columns = [Column(name, False) for name in group.columns]
    columns += [Column("seeds"), Column("last module, %"), Column("ensemble, %")]
    columns += [Column("images/s"), Column("peak memory"), Column("bytes up"), Column("bytes down")]
    columns += [Column("staleness"), Column("state", False), Column("run", False)]
    cells = [
        [
            *(_setting(row.settings.get(name), n in best_last) for name in group.columns),
            _seeds(row),
            _percent(row.accuracy(-1), n in best_last),
            _percent(row.ensemble(), n in best_all),
            _number(row.speed(), "{:,.1f}".format),
            _memory(row),
            _number(row.wire(down=False), bytes_text),
            _number(row.wire(down=True), bytes_text),
            _number(row.staleness(), "{:.2f}".format),
            Cell(row.state()),
            Cell(row.name),
        ]
        for n, row in enumerate(group.rows)
    ]
    if group.columns:
        return columns, cells
    return [columns[-1], *columns[:-1]], [[row[-1], *row[:-1]] for row in cells]


def modules(group: Group) -> Table | None:
    """Returns the table of the test accuracy of every module; None if no run is finished."""
    rows = [(n, row) for n, row in enumerate(group.rows) if row.finished]
    count = max((row.modules for _, row in rows), default=0)
    if not count:
        return None
    columns = [Column("test accuracy, %", False)]
    columns += [Column(f"module {k}") for k in range(count)] + [Column("ensemble")]
    names = labels(group)

    def measure(k: int) -> Callable[[Row], Value | None]:
        return lambda row: row.accuracy(k) if k < row.modules else None

    best = [group.best(measure(k)) for k in range(count)] + [group.best(Row.ensemble)]
    return columns, [
        [
            Cell(names[n]),
            *(_percent(measure(k)(row), n in best[k]) for k in range(count)),
            _percent(row.ensemble(), n in best[-1]),
        ]
        for n, row in rows
    ]


def problems(runs: Sequence[Run]) -> Table:
    """Returns the table of runs that are not finished, or of which something cannot be read."""
    columns = [Column(title, False) for title in ("run", "state", "step", "reason")]
    return columns, [
        [
            Cell(run.name),
            Cell(run.state),
            Cell(run.progress() or NONE),
            Cell(run.problem or NONE),
        ]
        for run in runs
    ]


def members(row: Row) -> Table:
    """Returns the table of the runs of one row."""
    columns = [Column("run", False), Column("seed"), Column("last module, %")]
    columns += [Column("ensemble, %"), Column("state", False)]
    singles = [Row((run,)) for run in row.runs]
    return columns, [
        [
            Cell(run.name),
            Cell(setting_text(run.seed), _sortable(run.seed)),
            _percent(single.accuracy(-1)),
            _percent(single.ensemble()),
            Cell(run.state if run.finished else f"{run.state} {run.progress()}".strip()),
        ]
        for run, single in zip(row.runs, singles)
    ]


def summary_line(report: Report) -> str:
    """Returns the number of runs and of their states."""
    count = len(report.runs)
    states = ", ".join(f"{number} {state}" for state, number in report.states().items())
    return f"{count} run{'s' if count > 1 else ''}: {states}"


PROBLEMS = "Unfinished, failed and damaged runs"
LEGEND = (
    "Accuracies are on the test set, mean \N{PLUS-MINUS SIGN} sample standard deviation over the "
    "seeds; the best of a group is bold. Bytes up (activations) and down (gradients) are per image "
    "over all hops. Staleness is the mean age of the messages read, in updates, of the module "
    "where it is largest. Peak memory is of the fullest device, or of the process on the host."
)


def markdown(report: Report) -> str:
    """Returns the report as a Markdown page."""
    parts = [f"# {_escape(report.title)}", summary_line(report) + ".", LEGEND]
    parts += [f"- {_escape(note)}" for note in report.notes]
    for group in report.groups:
        parts.append(f"## {_escape(heading(group))}")
        if group.fixed:
            parts.append(f"With {_escape(settings_text(group.fixed))}.")
        parts.append(_table(results(group)))
        if table := modules(group):
            parts.append(_table(table))
    if report.problems:
        parts += [f"## {PROBLEMS}", _table(problems(report.problems))]
    if commands := [run.command for run in report.runs if run.command]:
        parts += ["## Commands", "```sh\n" + "\n".join(commands) + "\n```"]
    if report.shared:
        parts += ["## Settings equal in all rows", _escape(settings_text(report.shared))]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    """Returns a table in Markdown with aligned columns."""
    columns, rows = table
    lines = [[_escape(column.title) for column in columns]]
    lines += [
        [f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text) for cell in row]
        for row in rows
    ]
    widths = [max(3, *(len(line[n]) for line in lines)) for n in range(len(columns))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column.number else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if column.number else "-")
        for width, column in zip(widths, columns)
    ]
    return "\n".join([joined(lines[0]), joined(rule), *map(joined, lines[1:])])


def _escape(text: str) -> str:
    """Escapes the characters that Markdown would read as markup, and joins lines."""
    # An underscore inside a word is no markup.
    return re.sub(r"([\\`*<>&|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _leaf(name: str) -> str:
    """Returns the short form of a setting: "optimizer.learning_rate" as "learning_rate"."""
    group, _, leaf = name.rpartition(".")
    return group if leaf == "name" else leaf


def _sortable(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _setting(value: Any, best: bool) -> Cell:
    return Cell(setting_text(value), _sortable(value), best)


def _seeds(row: Row) -> Cell:
    done, count = len(row.finished), len(row.runs)
    text = str(done) if done == count else f"{done} of {count}"
    seeds = ", ".join(setting_text(run.seed) for run in row.runs)
    return Cell(text, done, hint=seeds if count > 1 else "")


def _percent(value: Value | None, best: bool = False) -> Cell:
    if value is None:
        return Cell(NONE)
    text, hint = f"{100 * value.mean:.2f}", ""
    if value.deviation is not None:
        text += f" \N{PLUS-MINUS SIGN} {100 * value.deviation:.2f}"
        hint = f"over {value.count} seeds"
    return Cell(text, value.mean, best, hint)


def _number(value: Value | None, form: Callable[[float], str]) -> Cell:
    return Cell(NONE) if value is None else Cell(form(value.mean), value.mean)


def _memory(row: Row) -> Cell:
    memory = row.memory()
    if memory is None:
        return Cell(NONE)
    peak, place = memory
    return Cell(bytes_text(peak) + (" (host)" if place == "host" else ""), peak)
