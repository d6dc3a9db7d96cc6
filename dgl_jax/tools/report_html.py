"""Page of a report: one HTML file with its styles, curves and script inside."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgl_jax.tools.report_curves import Line, panel, style
from dgl_jax.tools.report_groups import Group, Report, Row
from dgl_jax.tools.report_runs import FAILED, FINISHED, UNREADABLE, Run
from dgl_jax.tools.report_tables import (
    LEGEND,
    PROBLEMS,
    Cell,
    Column,
    Table,
    heading,
    labels,
    members,
    modules,
    problems,
    results,
    setting_text,
    settings_text,
    summary_line,
)

_PANELS = (
    ("validation accuracy, %", "validation", "accuracy"),
    ("training accuracy, %", "train", "accuracy"),
    ("validation loss", "validation", "loss"),
    ("training loss", "train", "loss"),
    ("squared gradient norm", "diagnostics", "gradient_squared"),
    ("squared gradient norm, final inputs", "final", "gradient_squared"),
    ("drift since the last probe (MMD)", "diagnostics", "mmd"),
    ("drift since the last probe (Wasserstein)", "diagnostics", "wasserstein"),
    ("drift sum of the bound", "final", "weighted_drift"),
    ("relative error of the codec", "diagnostics", "codec_error"),
    ("age of the messages read", "diagnostics", "staleness"),
)
# Points of all curves together, which bound the size of the page.
_POINTS = 28_000
_FEWEST, _MOST = 8, 200
# Nothing outside the page is loaded, whatever the names of runs contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(report: Report) -> str:
    """Returns the HTML page of a report."""
    limit = _points_per_curve(report)
    body = [
        f"<h1>{_text(report.title)}</h1>",
        f"<p>{_text(summary_line(report))}.</p>",
        f'<p class="muted">{_text(LEGEND)}</p>',
        *(f'<p class="note">{_text(note)}</p>' for note in report.notes),
    ]
    if report.shared:
        body.append(_shared(report.shared))
    for number, group in enumerate(report.groups):
        body += _group(group, number, limit)
    if report.problems:
        body += _problems(report.problems)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(report.title)}</title>",
            f"<style>{_file('report.css')}</style></head>",
            "<body>",
            *body,
            f"<script>{_file('report.js')}</script>",
            "</body></html>",
            "",
        ]
    )


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(text)


def _points_per_curve(report: Report) -> int:
    """Returns the greatest number of points per curve with which the page stays small."""
    rows = [row for group in report.groups for row in group.rows]
    measured = {(split, metric) for run in report.runs for split, _, metric in run.curves}
    panels = sum((split, metric) in measured for _, split, metric in _PANELS)
    curves = sum(panels * (1 + _drawn_modules(row)) for row in rows)
    return min(_MOST, max(_FEWEST, _POINTS // max(1, curves)))


def _drawn_modules(row: Row) -> int:
    """Returns the number of modules that have curves of their own in the details of a row."""
    return row.modules if row.modules > 1 else 0


def _shared(settings: Mapping[str, Any]) -> str:
    names = ("data.name", "task.name", "model.name", "model.modules", "method.name", "train.epochs")
    most = {name: settings[name] for name in names if name in settings}
    items = " ".join(
        f"<code>{_text(name)}={_text(setting_text(value))}</code>"
        for name, value in settings.items()
    )
    shown = f": {_text(settings_text(most))}, \N{HORIZONTAL ELLIPSIS}" if most else ""
    return (
        f"<details><summary>{len(settings)} settings equal in all rows{shown}</summary>"
        f"<p>{items}</p></details>"
    )


def _group(group: Group, number: int, limit: int) -> list[str]:
    """Returns heading, tables, curves and the details of the rows of a group."""
    names = labels(group)
    ids = [f"row-{number}-{n}" for n in range(len(group.rows))]
    parts = ["<section>", f"<h2>{_text(heading(group))}</h2>"]
    if group.fixed:
        parts.append(f'<p class="muted">with {_text(settings_text(group.fixed))}</p>')
    copied = [any(run.command for run in row.runs) for row in group.rows]
    parts.append(_table(results(group), [f if c else "" for f, c in zip(ids, copied)]))
    if table := modules(group):
        parts.append(_table(table))
    parts.append(_figure(group, names, limit))
    for row, name, anchor in zip(group.rows, names, ids):
        parts.append(_row(row, name, anchor, limit))
    return [*parts, "</section>"]


def _figure(group: Group, names: Sequence[str], limit: int) -> str:
    lines = {
        title: [
            Line(n, name, curve)
            for n, (row, name) in enumerate(zip(group.rows, names))
            if (curve := row.curve(split, -1, metric))
        ]
        for title, split, metric in _PANELS
    }
    return _panels(lines, dict(enumerate(names)), "last module", limit)


def _panels(
    lines: Mapping[str, Sequence[Line]], names: Mapping[int, str], caption: str, limit: int
) -> str:
    """Returns a figure of panels with one legend; "" without any line.

    Args:
      lines: lines of each panel by its title.
      names: entries of the legend by the number of their lines.
      caption: text above the legend.
      limit: greatest number of points per line.
    """
    drawn_numbers = {line.number for panel_lines in lines.values() for line in panel_lines}
    if not drawn_numbers:
        return ""
    legend = "".join(_entry(number, names[number]) for number in sorted(drawn_numbers))
    if len(drawn_numbers) > 2:
        legend = f'<button class="all" type="button">all or none</button>{legend}'
    drawn = "".join(panel(title, ls, "accuracy" in title, limit) for title, ls in lines.items())
    return (
        f"<figure><figcaption>{_text(caption)}</figcaption>"
        f'<form class="legend" autocomplete="off">{legend}</form>'
        f'<div class="panels">{drawn}</div></figure>'
    )


def _entry(number: int, label: str) -> str:
    return (
        f'<label><input type="checkbox" value="{number}" checked>'
        f'<i class="{style(number)}"></i>{_text(label)}</label>'
    )


def _row(row: Row, name: str, anchor: str, limit: int) -> str:
    """Returns the details of a row: its runs, their commands, and curves per module."""
    commands = "".join(
        _command(run.command, f"{anchor}-{n}") for n, run in enumerate(row.runs) if run.command
    )
    entries = {k: f"module {k}" for k in range(row.modules)}
    curves = {
        title: [
            Line(k, "", curve)
            for k in range(_drawn_modules(row))
            if (curve := row.curve(split, k, metric))
        ]
        for title, split, metric in _PANELS
    }
    table = _table(members(row)) if len(row.runs) > 1 else ""
    return (
        f'<details id="{anchor}"><summary>{_text(name)}</summary>{table}{commands}'
        f"{_panels(curves, entries, 'per module', limit)}</details>"
    )


def _command(command: str, anchor: str) -> str:
    return f'<div class="command" id="{anchor}"><code>{_text(command)}</code>{_copy(anchor)}</div>'


def _problems(runs: Sequence[Run]) -> list[str]:
    """Returns the section of the runs with problems.

    The commands of runs without settings, which are in no group, are listed here.
    """
    parts = ["<section>", f"<h2>{PROBLEMS}</h2>", _table(problems(runs))]
    for n, run in enumerate(runs):
        if run.command and not run.settings:
            parts.append(f'<p class="muted">{_text(run.name)}</p>')
            parts.append(_command(run.command, f"problem-{n}"))
    return [*parts, "</section>"]


def _table(table: Table, anchors: Sequence[str] = ()) -> str:
    """Returns a table that can be sorted.

    Args:
      table: its content.
      anchors: per row, the element with the commands that a button after the state copies; "" for
        a row without a command.
    """
    columns, rows = table
    heads, lines = "", ["" for _ in rows]
    for place, column in enumerate(columns):
        kind = _class("number" if column.number else "")
        heads += f'<th scope="col"{kind}><button type="button">{_text(column.title)}</button></th>'
        for n, row in enumerate(rows):
            lines[n] += _cell(column, row[place])
        if anchors and column.title == "state":
            heads += '<th scope="col">command</th>'
            for n, anchor in enumerate(anchors):
                lines[n] += f"<td>{_copy(anchor) if anchor else ''}</td>"
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"
    )


def _cell(column: Column, cell: Cell) -> str:
    kinds = ["number"] * column.number + ["best"] * cell.best
    kinds += ["wrap"] * (column.title == "reason")
    sort = "" if cell.sort is None else f' data-sort="{cell.sort:.9g}"'
    hint = f' title="{_text(cell.hint)}"' if cell.hint else ""
    text = _text(cell.text)
    if column.title == "state":
        text = f'<span class="state{_mood(cell.text)}">{text}</span>'
    return f"<td{_class(' '.join(kinds))}{sort}{hint}>{text}</td>"


def _copy(anchor: str) -> str:
    """Returns a button that copies the commands inside an element."""
    return f'<button class="copy" type="button" data-from="{anchor}">copy</button>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _mood(state: str) -> str:
    """Returns the class of a state, which decides its color."""
    if FAILED in state or UNREADABLE in state:
        return " bad"
    return "" if state == FINISHED else " open"
