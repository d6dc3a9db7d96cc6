"""Figures that need several rows, and the tables at the end."""

from collections.abc import Mapping
from typing import Any

from benchmarks.accelerator.rows import Figures

_PASSES = 3  # a step computes about three times the operations of a forward pass
_BOUND = 1.3  # allowed time of a tick under DGL, in units of its operations over back-propagation's
_TITLES = {
    "a": "Engines, codecs, methods and modes",
    "b": "Exact resume",
    "c": "Speed and memory",
    "d": "Switches alone, over the defaults",
    "e": "Accuracy",
}
_TIMED = ("images/s", "ms per tick", "over baseline", "% of matrix rate")
_SIDE = ("time over back-propagation (bound)", "over the best PyTorch", "peak, GiB")


def derive(rows: Mapping[str, Figures]) -> None:
    """Adds the share of the matrix rate and the ratios to back-propagation and PyTorch.

    Args:
      rows: entries of the results by name; their figures are changed.
    """
    timed = [
        entry["figures"]
        for entry in rows.values()
        if "tick_milliseconds" in entry.get("figures", {}) and entry["group"] in "cd"
    ]
    rates = {
        entry["figures"]["dtype"]: entry["figures"]["flops_per_second"]
        for entry in rows.values()
        if "flops_per_second" in entry.get("figures", {})
    }
    for figures in timed:
        flops = _PASSES * (figures["body_flops"] + figures["head_flops"])
        if rate := rates.get(figures["dtype"]):
            seconds = figures["tick_milliseconds"]["median"] / 1e3
            figures["percent_of_matrix_rate"] = round(100 * flops / seconds / rate, 2)
    # The rows of group d have other baselines.
    timed = [figures for figures in timed if "settings" not in figures]
    same = ("library", "network", "batch_size", "dtype", "compiled")
    backprop = {_key(f, same): f for f in timed if f["method"] == "backprop"}
    for figures in timed:
        other = backprop.get(_key(figures, same))
        if figures["method"] != "backprop" and other:
            figures["over_backprop"] = round(_time(figures, other), 3)
            heads = figures["head_flops"] / figures["body_flops"]
            figures["bound"] = round(_BOUND * (1 + heads), 3)
    quickest: dict[tuple[Any, ...], float] = {}
    same = ("network", "method", "batch_size", "dtype")
    for figures in timed:
        if _is_peer(figures):
            key, rate = _key(figures, same), figures["images_per_second"]["median"]
            quickest[key] = max(rate, quickest.get(key, 0.0))
    for figures in timed:
        if not _is_peer(figures) and (peer := quickest.get(_key(figures, same))):
            figures["over_pytorch"] = round(figures["images_per_second"]["median"] / peer, 3)


def _is_peer(figures: Figures) -> bool:
    return figures["library"].startswith("PyTorch")


def _key(figures: Figures, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(figures.get(name) for name in names)


def _time(figures: Figures, other: Figures) -> float:
    """Returns the time of a tick over that of another run, through their baseline if they have one.

    Two runs of one process were measured in turns with the same baseline.
    """
    if "over_baseline" in figures or "over_baseline" in other:
        speeds = [f.get("over_baseline", {"median": 1.0})["median"] for f in (figures, other)]
        return speeds[1] / speeds[0]
    return figures["tick_milliseconds"]["median"] / other["tick_milliseconds"]["median"]


def show(rows: Mapping[str, Figures]) -> None:
    """Prints a table of every group that has rows."""
    from benchmarks import harness

    for group, title in _TITLES.items():
        entries = {name: entry for name, entry in rows.items() if entry["group"] == group}
        if not entries:
            continue
        print(f"\n{title}\n")
        columns = (*_TIMED, *_SIDE) if group in "cd" else ("figures",)
        cells = _speed_cells if group in "cd" else _plain_cells
        harness.table(
            ("row", *columns, "s"),
            [
                (name, *cells(entry, len(columns)), entry.get("seconds", ""))
                for name, entry in entries.items()
            ],
        )
    print()


def _plain_cells(entry: Figures, count: int) -> list[str]:
    if "reason" in entry:
        return [entry["reason"]]
    return [", ".join(f"{name} {value}" for name, value in entry["figures"].items())]


def _speed_cells(entry: Figures, count: int) -> list[str]:
    if "reason" in entry:
        return [entry["reason"], *[""] * (count - 1)]
    from benchmarks import harness

    figures = entry["figures"]
    if "flops_per_second" in figures:
        return [f"{figures['flops_per_second'] / 1e12:.4g} TFLOP/s", *[""] * (count - 1)]
    if "command_seconds" in figures:
        return [*_plain_cells(entry, 1), *[""] * (count - 1)]
    quartiles = ("images_per_second", "tick_milliseconds", "over_baseline")
    memory, ratio = figures.get("peak_memory_bytes"), figures.get("over_backprop")
    return [
        *(harness.shown(figures[name]) if name in figures else "" for name in quartiles),
        str(figures.get("percent_of_matrix_rate", "")),
        f"{ratio} ({figures['bound']})" if ratio else "",
        str(figures.get("over_pytorch", "")),
        f"{memory / 2**30:.3g}" if isinstance(memory, int) else memory or "",
    ]
