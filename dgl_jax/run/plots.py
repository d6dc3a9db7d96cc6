"""Plots of a run, drawn from its metrics.jsonl into PNG files."""

import io
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dgl_jax.errors import UserError
from dgl_jax.run.axes import (
    GRAY,
    Figure,
    colors_of,
    curve_axes,
    draw_line,
    draw_newest,
    log_scale,
    new_axes,
    own_style,
    paired_axes,
    value_table,
)
from dgl_jax.run.curves import Record, head_names, read_records, series, title_and_subtitle
from dgl_jax.run.writers import check_writable, write_atomically, writing

# Palette for color-blind readers by Okabe and Ito, without yellow; one color per run.
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
_TEST = "\N{BLACK DIAMOND} test"


@own_style()
def plot(workdir: str | os.PathLike[str]) -> list[Path]:
    """Draws the plots of a run into `<workdir>/plots/`.

    Draws `accuracy.png` and `loss.png`, `timeline.png` and `ages.png` for asynchronous runs,
    `codec.png` for runs with a codec, and `convergence.png` for runs with diagnostics, as far as
    metrics.jsonl holds the metrics for them.

    Args:
      workdir: folder of the run.

    Returns:
      The files written.

    Raises:
      UserError: metrics.jsonl is missing or holds nothing to plot, or the plots cannot be written.
    """
    workdir = Path(workdir)
    records, title = read_records(workdir), title_and_subtitle(workdir)
    check_writable(workdir / "plots", str(workdir / "plots"), folder=True)
    draw = {
        "accuracy": accuracy_figure,
        "loss": loss_figure,
        "timeline": timeline_figure,
        "ages": ages_figure,
        "codec": codec_figure,
        "convergence": convergence_figure,
    }
    drawn = {name: draw_figure(records, *title) for name, draw_figure in draw.items()}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    if not figures:
        raise UserError(
            f"{workdir / 'metrics.jsonl'}: no accuracy and no loss yet; "
            "plot again once metrics have been logged"
        )
    return [_save(figure, workdir / "plots" / f"{name}.png") for name, figure in figures.items()]


@own_style()
def compare(
    runs: Mapping[str, str | os.PathLike[str] | Sequence[Record]],
    path: str | os.PathLike[str],
    title: str = "",
) -> Path:
    """Draws the accuracy of several runs' last modules, on validation and test data, into one file.

    Args:
      runs: maps labels to workdirs, or to records.
      path: the PNG file to write.
      title: title of the figure.

    Returns:
      The path of the file.

    Raises:
      UserError: a workdir has no metrics.jsonl, or no run has a validation or test accuracy.
    """
    loaded = {
        name: read_records(Path(run)) if isinstance(run, str | os.PathLike) else run
        for name, run in runs.items()
    }
    figure = compare_figure(loaded, title)
    if figure is None:
        raise UserError(
            f"{', '.join(runs) or 'no runs'}: no validation or test accuracy to compare"
        )
    return _save(figure, Path(path))


@own_style()
def draw_turns(
    path: str | os.PathLike[str],
    turns: Sequence[tuple[int, float, float]],
    unit: str,
    step: int,
    title: str,
    subtitle: str,
) -> Path:
    """Draws a timeline of turns into one file.

    Args:
      path: the PNG file to write.
      turns: turns as (module, begin, end).
      unit: unit of `begin` and `end`, such as "seconds".
      step: step that the last turn belongs to.
      title: title of the figure.
      subtitle: line below the title; may be empty.

    Returns:
      The path of the file.
    """
    figure = timeline_figure([{"turns": turns, "unit": unit, "step": step}], title, subtitle)
    assert figure is not None, "`turns` must not be empty"
    return _save(figure, Path(path))


def accuracy_figure(
    records: Sequence[Record], title: str = "", subtitle: str = ""
) -> Figure | None:
    """Draws the validation accuracy of every module and of the ensemble.

    Training accuracy is drawn in pale colors, and test accuracy as diamonds. Returns None if the
    records hold no accuracy.
    """
    names = head_names(records, r"(?:train|validation|test)/(module_\d+|ensemble)/accuracy")
    if not names:
        return None
    figure, axes = curve_axes(title, subtitle, "accuracy", records, len(names))
    colors, rows, lowest = colors_of(records, names), [], []
    for name in names:
        train, validation, test = (
            series(records, f"{s}/{name}/accuracy") for s in ("train", "validation", "test")
        )
        draw_line(axes, train, colors[name], f"train {name}", alpha=0.35, linewidth=0.9)
        style = {"linestyle": (0, (4, 1.5)), "zorder": 3} if name == "ensemble" else {}
        draw_line(axes, validation, colors[name], f"validation {name}", linewidth=1.8, **style)
        draw_newest(axes, test, colors[name], f"test {name}")
        lowest += [y for y in validation[1] + test[1] if math.isfinite(y)]
        rows.append((name.replace("_", " "), colors[name], (validation, test, train)))
    top = min(axes.get_ylim()[1], 1.01)
    if lowest:
        # Clip the training accuracy of the first steps, which is far below the range of interest.
        axes.set_ylim(bottom=max(0.0, min(lowest) - 0.08 * (top - min(lowest)) - 0.01))
    axes.set_ylim(top=top)
    value_table(axes, rows, ("validation", _TEST, "train (pale)"))
    return figure


def loss_figure(records: Sequence[Record], title: str = "", subtitle: str = "") -> Figure | None:
    """Draws the training loss of every module; returns None if the records hold no loss.

    The vertical axis is logarithmic if the losses span more than a factor of ten.
    """
    names = head_names(records, r"train/(module_\d+)/loss")
    if not names:
        return None
    figure, axes = curve_axes(title, subtitle, "training loss", records, len(names))
    colors, rows, values = colors_of(records, names), [], []
    for name in names:
        curve = series(records, f"train/{name}/loss")
        draw_line(axes, curve, colors[name], f"train {name}", linewidth=1.5)
        values += [y for y in curve[1] if math.isfinite(y)]
        rows.append((name.replace("_", " "), colors[name], (curve,)))
    if values and min(values) > 0 and max(values) > 10 * min(values):
        log_scale(axes)
    value_table(axes, rows, ("last",), "#.3g")
    return figure


def timeline_figure(
    records: Sequence[Record], title: str = "", subtitle: str = ""
) -> Figure | None:
    """Draws which module worked when, in the newest record of turns; returns None without one."""
    with_turns = [record for record in records if record.get("turns")]
    if not with_turns:
        return None
    newest = with_turns[-1]
    turns, unit = newest["turns"], newest["unit"]
    colors = colors_of(records, [f"module_{k}" for k, _, _ in turns])
    # All modules of the run, including those without a recent turn.
    names = [name for name in colors if name != "ensemble"]
    figure, axes = new_axes(title, subtitle, 1.6 + 0.4 * len(names))
    for k, name in enumerate(names):
        spans = [(a, b - a) for module, a, b in turns if module == k]
        axes.broken_barh(
            spans, (k - 0.38, 0.76), facecolors=[colors[name]], edgecolor="white", linewidth=0.6
        )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)  # module 0 on top; a row without bars has its place too
    axes.set_xlim(min(turn[1] for turn in turns), max(turn[2] for turn in turns))
    axes.set_xlabel(f"{unit} up to step {newest['step']:,}", fontsize=11)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    return figure


def ages_figure(records: Sequence[Record], title: str = "", subtitle: str = "") -> Figure | None:
    """Draws the distribution of the ages of the messages that each module has read in the run.

    The age of a message is the number of messages that its producer has sent after it. Returns None
    if no message has been read.
    """
    pattern = re.compile(r"replay/(module_\d+)/ages_from_(\d+)")
    newest: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            if match := pattern.fullmatch(key):
                newest.setdefault(match[1], {})[int(match[2])] = value
    counts = {name: ages for name, ages in newest.items() if sum(ages.values())}
    if not counts:
        return None
    figure, axes = new_axes(title, subtitle, 4.4)
    names = sorted(counts, key=lambda name: int(name.split("_")[1]))
    colors, starts = colors_of(records, names), sorted(counts[names[0]])
    width = 0.84 / len(names)
    for n, name in enumerate(names):
        share = [counts[name][start] / sum(counts[name].values()) for start in starts]
        positions = np.arange(len(starts)) - 0.42 + width * (n + 0.5)
        axes.bar(positions, share, 0.9 * width, color=colors[name], label=name.replace("_", " "))
    labels = [
        f"{a}" if b == a + 1 else f"{a}\N{EN DASH}{b - 1}" for a, b in itertools.pairwise(starts)
    ]
    # The last bin reaches up to the size of the ring.
    labels.append(f"{starts[-1]}+" if starts[-1] > 1 else f"{starts[-1]}")
    axes.set_xticks(range(len(starts)), labels)
    axes.set_xlabel("age of a message when it was read, in messages of its producer", fontsize=11)
    axes.set_ylabel("share of reads", fontsize=11)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=10)
    return figure


def codec_figure(records: Sequence[Record], title: str = "", subtitle: str = "") -> Figure | None:
    """Draws the reconstruction error over the rate on the wire for every hop.

    The newest record is a large dot, earlier ones are pale. Returns None if the run has no codec
    metrics.
    """
    figure, axes = new_axes(title, subtitle, 4.4)
    names = head_names(records, r"train/(module_\d+)/codec_error")
    colors, shown = colors_of(records, names), []
    for name in names:
        keys = (f"wire/{name}/compression", f"train/{name}/codec_error")
        points = [
            tuple(map(float, (record[key] for key in keys)))
            for record in records
            if all(record.get(key) for key in keys)
        ]
        if points:
            rates, errors = zip(*((32.0 / compression, error) for compression, error in points))
            axes.plot(rates[:-1], errors[:-1], ".", color=colors[name], alpha=0.25)
            axes.plot(
                rates[-1],
                errors[-1],
                "o",
                color=colors[name],
                markersize=8,
                label=f"after {name.replace('_', ' ')}",
            )
            shown += points
    if not shown:
        return None
    axes.plot([], [], ".", color=GRAY, alpha=0.5, label="earlier (pale)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [2.0**n for n in range(-4, 6)], [f"{tick:g}" for tick in ticks])
    shown_rates = [32.0 / compression for compression, _ in shown]
    axes.set_xlim(min(shown_rates) / 2.5, max(shown_rates) * 2.5)  # wide enough for one tick
    axes.set_ylim(0.0, 1.1 * max(error for _, error in shown))
    axes.set_xlabel(
        "bits per value on the wire (of 32), including labels, ids and codebooks", fontsize=11
    )
    axes.set_ylabel("relative reconstruction error", fontsize=11)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def convergence_figure(
    records: Sequence[Record], title: str = "", subtitle: str = ""
) -> Figure | None:
    """Draws the running minimum of every module's squared gradient norm, and the drift sum.

    The drift sum is sum(eta sqrt(c)) / sum(eta) over the updates so far, with the distance c
    between a module's inputs and those at the end of training. It is known once the run has ended;
    until then the right half shows the drift from one probe to the next. Returns None without
    diagnostics.
    """
    names = head_names(records, r"diagnostics/(module_\d+)/gradient_squared")
    if not names:
        return None
    ended = head_names(records, r"final/(module_\d+)/weighted_drift")
    drift = "final/{}/weighted_drift" if ended else "diagnostics/{}/mmd"
    drifting = head_names(records, drift.format(r"(module_\d+)"))
    labels = (
        "running minimum of the squared gradient norm",
        "drift sum of the bound" if ended else "drift since the last probe (MMD)",
    )
    figure, (left, right) = paired_axes(title, subtitle, labels, records)
    colors, values = colors_of(records, names), []
    for name in names:
        epochs, squares = series(records, f"diagnostics/{name}/gradient_squared")
        curve = epochs, np.fmin.accumulate(squares).tolist()
        draw_line(left, curve, colors[name], name.replace("_", " "), linewidth=1.5)
        values += [y for y in curve[1] if math.isfinite(y)]
    for name in drifting:
        curve = series(records, drift.format(name))
        draw_line(right, curve, colors[name], name.replace("_", " "), linewidth=1.5)
    if values and 0 < 10 * min(values) < max(
        values
    ):  # an axis of less has no tick at a power of 10
        log_scale(left)
    right.set_ylim(bottom=0.0)
    left.legend(frameon=False, fontsize=9)
    if {*drifting} - {*names}:  # modules without a gradient
        right.legend(frameon=False, fontsize=9)
    return figure


def compare_figure(runs: Mapping[str, Sequence[Record]], title: str = "") -> Figure | None:
    """Draws the validation accuracy of each run's last module, and its test accuracy as a diamond.

    Returns None if no run has either.
    """
    all_records = [record for records in runs.values() for record in records]
    figure, axes = curve_axes(title, "last module", "accuracy", all_records, len(runs))
    rows = []
    for number, (name, records) in enumerate(runs.items()):
        if modules := head_names(records, r"(?:validation|test)/(module_\d+)/accuracy"):
            validation, test = (
                series(records, f"{s}/{modules[-1]}/accuracy") for s in ("validation", "test")
            )
            color, style = _RUNS[number % len(_RUNS)], ("-", "--", ":")[number // len(_RUNS) % 3]
            draw_line(axes, validation, color, f"validation {name}", linewidth=1.8, linestyle=style)
            draw_newest(axes, test, color, f"test {name}")
            rows.append((name, color, (validation, test)))
    value_table(axes, rows, ("validation", _TEST))
    return figure if rows else None


def _save(figure: Figure, path: Path) -> Path:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    with writing(str(path)):
        write_atomically({path: png.getvalue()})
    return path
