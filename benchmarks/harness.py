"""Functions shared by the benchmarks: settings, statistics, tables and `result.json`."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import dgl_jax
from dgl_jax import system
from dgl_jax.config import Settings, default_config, make_settings

# Fields of a small network, for `settings`; its programs are dominated by their overhead.
DIGITS: dict[str, Any] = {
    "data__name": "digits",
    "data__batch_size": 64,
    "model__name": "cnn4",
    "model__width": 32,
    "model__modules": 4,
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the common flags; `doc` is the docstring of the benchmark."""
    flags = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    flags.add_argument("--write", action="store_true", help="write result.json beside the script")
    return flags


def settings(**fields: Any) -> Settings:
    """Returns checked settings: the defaults, with `model__width=4` for `config.model.width`."""
    config = default_config()
    for name, value in fields.items():
        group, _, field = name.rpartition("__")
        setattr(config[group] if group else config, field, value)
    return make_settings(config)


def programs(engine: Any) -> list[Any]:
    """Returns the programs of all modules, called as `program(state, Inbox(incoming), context)`."""
    return [engine.programs[k, "step"] for k in range(len(engine.spec.modules))]


def step(engine: Any) -> Any:
    """Returns the single program of `fused`, called as `step(states, batch)`."""
    return engine.steps[tuple((k, "step") for k in range(len(engine.spec.modules)))]


def quartiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Computes the median and the quartiles ("low" and "high") of some measurements."""
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else (values[0],) * 3
    )
    return {
        "median": round(statistics.median(values), digits),
        "low": round(low, digits),
        "high": round(high, digits),
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Computes the ratio of each repeat, in which slow drifts (clock, other load) cancel."""
    return [a / b for a, b in zip(over, under, strict=True)]


def shown(q: dict[str, float]) -> str:
    """Formats the result of `quartiles`, for example '1.90 [1.85 - 1.93]'."""
    return f"{q['median']:.3g} [{q['low']:.3g} - {q['high']:.3g}]"


def environment() -> dict[str, Any]:
    """Describes versions, machine, date and command, which are needed to repeat a measurement."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpus": system.machine_cpus(),
        "cpus_allowed": system.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "processor": _processor(),
        "devices": [system.device_kind(device) for device in jax.devices()],
        "versions": {"python": platform.python_version(), "dgl_jax": dgl_jax.__version__}
        | {name: version(name) for name in _PACKAGES},
    }


def finish(script: str, result: dict[str, Any], write: bool) -> None:
    """Writes `result.json` beside the script if `write` is set."""
    if write:
        path = Path(script).with_name("result.json")
        path.write_text(json.dumps({"environment": environment()} | result, indent=1) + "\n")
        print(f"written: {os.path.relpath(path)}")


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], out: Callable[[str], Any] = print
) -> None:
    """Prints a Markdown table in the format of the README pages."""
    for row in (header, ["---"] * len(header), *rows):
        out("| " + " | ".join(str(cell) for cell in row) + " |")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()
