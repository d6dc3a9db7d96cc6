"""Curves from the records of a run: the values of a metric over epochs, for plotting."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgl_jax.errors import UserError
from dgl_jax.run.writers import read_jsonl

Record = Mapping[str, Any]
Curve = tuple[list[float], list[float]]  # epochs, values


def series(records: Iterable[Record], key: str) -> Curve:
    """Returns the curve of one metric.

    Args:
      records: records of a run, see `JsonLinesWriter`.
      key: name of the metric.

    Returns:
      Epochs (steps for records without an epoch) and values, NaN for null.
    """
    shown = [record for record in records if key in record]
    return [*map(epoch_or_step, shown)], [_number(record, key, math.nan) for record in shown]


def epoch_or_step(record: Record) -> float:
    """Returns the position of a record on the horizontal axis."""
    epoch = _number(record, "epoch", math.nan)
    return _number(record, "step", 0.0) if math.isnan(epoch) else epoch


def _number(record: Record, key: str, default: float) -> float:
    """Returns a value of a record; `default` for one that is missing or null."""
    value = record.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{key} is {value!r} in a record of metrics, not a number") from None


def head_names(records: Iterable[Record], pattern: str) -> list[str]:
    """Returns the names that have a metric, in the order 'module_0', 'module_1', ..., 'ensemble'.

    Args:
      records: records of a run.
      pattern: regular expression for the metric, whose first group is the name.
    """
    keys = {key for record in records for key in record}
    names = {match[1] for key in keys if (match := re.fullmatch(pattern, key))}
    return sorted(names, key=lambda name: int(name.split("_")[1]) if "_" in name else math.inf)


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """Reads the records of a run from its metrics.jsonl.

    Raises:
      UserError: the file is missing, empty or damaged.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; --workdir must be the folder of a run that has trained"
        )
    if records := read_jsonl(path):
        return records
    raise UserError(f"{path}: no record yet; plot again once metrics have been logged")


def title_and_subtitle(workdir: Path) -> tuple[str, str]:
    """Returns the name of a run and, if it has a readable summary.json, a line about it."""
    forms = {
        "method": "{}",
        "engine": "{}",
        "modules": "modules: {}",
        "steps": "steps: {:,}",
        "seed": "seed: {}",
    }
    try:
        summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        modules = {"modules": len(summary["modules"])} if "modules" in summary else {}
        details = [
            form.format((summary | modules)[key]) for key, form in forms.items() if key in summary
        ]
    except (OSError, ValueError, TypeError, RecursionError):
        details = []
    # Undecodable bytes become replacement characters: fonts have no glyphs for lone surrogates.
    name = os.fsencode(workdir.resolve().name).decode("utf-8", "replace")
    return name, ", ".join(details)
