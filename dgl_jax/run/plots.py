"""From metrics.jsonl to pictures."""

import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dgl_jax.errors import UserError
from dgl_jax.run.writers import check_writable, read_jsonl, write_atomically, writing
from dgl_jax.system import cache_dir


@contextmanager
def _any_environment() -> Iterator[None]:
    """Imports matplotlib whatever the environment says.

    A backend in MPLBACKEND that is not installed here would end the import. No window is opened, so none is needed; afterwards
    matplotlib has the backend as if it had read it, if it knows it. Without a home directory matplotlib needs another place.
    """
    before = {name: os.environ.get(name) for name in ("MPLBACKEND", "MPLCONFIGDIR")}
    if "matplotlib" not in sys.modules:
        os.environ.pop("MPLBACKEND", None)
        if not os.path.isabs(os.path.expanduser("~")):
            os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if before["MPLBACKEND"]:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = before["MPLBACKEND"]


with _any_environment():
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
    from matplotlib.transforms import ScaledTranslation

Record = Mapping[str, Any]
Line = tuple[list[float], list[float]]  # epochs, values
Row = tuple[str, Any, Sequence[Line]]  # name, colour, the lines whose last values stand beside it
_ENSEMBLE = "#d1495b"
_RUNS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#555555",
)  # Okabe and Ito, without yellow
_GREY = "#666666"
_TEST = "\N{BLACK DIAMOND} test"


def plot(workdir: str | os.PathLike[str]) -> list[Path]:
    """Draws `<workdir>/plots/accuracy.png`, `loss.png`, of asynchronous runs `timeline.png` and `ages.png`, of codecs `codec.png`.

    Each where metrics.jsonl holds numbers for it.

    Returns:
      The files written.

    Raises:
      UserError: metrics.jsonl is missing, or holds neither an accuracy nor a loss; or the pictures cannot be written.
    """
    workdir = Path(workdir)
    records, title = _records(workdir), _title(workdir)
    check_writable(workdir / "plots", str(workdir / "plots"), folder=True)
    figures_of = {
        "accuracy": accuracy_figure,
        "loss": loss_figure,
        "timeline": timeline_figure,
        "ages": ages_figure,
        "codec": codec_figure,
    }
    drawn = {name: figure_of(records, *title) for name, figure_of in figures_of.items()}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    if not figures:
        raise UserError(
            f"{workdir / 'metrics.jsonl'}: no accuracy and no loss yet; plot again after a log event"
        )
    return [_save(figure, workdir / "plots" / f"{name}.png") for name, figure in figures.items()]


def compare(
    runs: Mapping[str, str | os.PathLike[str] | Sequence[Record]],
    path: str | os.PathLike[str],
    title: str = "",
) -> Path:
    """Draws the last module's validation and test accuracy of several runs into one picture.

    Args:
      runs: label -> workdir, or the records themselves.
      path: the .png to write.
      title: stands above the picture.

    Raises:
      UserError: a workdir has no metrics.jsonl, or no run has a validation or test accuracy.
    """
    loaded = {
        name: _records(Path(run)) if isinstance(run, str | os.PathLike) else run
        for name, run in runs.items()
    }
    figure = compare_figure(loaded, title)
    if figure is None:
        raise UserError(
            f"{', '.join(runs) or 'no runs'}: no validation or test accuracy to compare"
        )
    return _save(figure, Path(path))


def draw_turns(
    path: str | os.PathLike[str],
    turns: Sequence[tuple[int, float, float]],
    unit: str,
    step: int,
    title: str,
    subtitle: str,
) -> Path:
    """Draws turns, each (module, begin, end) in that unit, up to a step, into one picture."""
    figure = timeline_figure([{"turns": turns, "unit": unit, "step": step}], title, subtitle)
    assert figure is not None, "there is always a turn"
    return _save(figure, Path(path))


def accuracy_figure(
    records: Sequence[Record], title: str = "", subtitle: str = ""
) -> Figure | None:
    """Validation accuracy a module and of the ensemble, training accuracy faintly, the test result as diamonds."""
    names = _heads(records, r"(?:train|validation|test)/(module_\d+|ensemble)/accuracy")
    if not names:
        return None
    figure, axes = _axes(title, subtitle, "accuracy", records, len(names))
    colors, rows, lowest = _colors(records, names), [], []
    for name in names:
        train, validation, test = (
            series(records, f"{s}/{name}/accuracy") for s in ("train", "validation", "test")
        )
        _line(axes, train, colors[name], f"train {name}", alpha=0.35, linewidth=0.9)
        style = {"linestyle": (0, (4, 1.5)), "zorder": 3} if name == "ensemble" else {}
        _line(axes, validation, colors[name], f"validation {name}", linewidth=1.8, **style)
        _mark(axes, test, colors[name], f"test {name}")
        lowest += [y for y in validation[1] + test[1] if math.isfinite(y)]
        rows.append((name.replace("_", " "), colors[name], (validation, test, train)))
    top = min(axes.get_ylim()[1], 1.01)
    if lowest:  # the first steps of training start far below what the picture is about: they enter from the bottom
        axes.set_ylim(bottom=max(0.0, min(lowest) - 0.08 * (top - min(lowest)) - 0.01))
    axes.set_ylim(top=top)
    _table(axes, rows, ("validation", _TEST, "train (pale)"))
    return figure


def loss_figure(records: Sequence[Record], title: str = "", subtitle: str = "") -> Figure | None:
    """Training loss a module; a logarithmic axis where the losses span more than a factor of ten."""
    names = _heads(records, r"train/(module_\d+)/loss")
    if not names:
        return None
    figure, axes = _axes(title, subtitle, "training loss", records, len(names))
    colors, rows, values = _colors(records, names), [], []
    for name in names:
        line = series(records, f"train/{name}/loss")
        _line(axes, line, colors[name], f"train {name}", linewidth=1.5)
        values += [y for y in line[1] if math.isfinite(y)]
        rows.append((name.replace("_", " "), colors[name], (line,)))
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _table(axes, rows, ("last",), "#.3g")
    return figure


def timeline_figure(
    records: Sequence[Record], title: str = "", subtitle: str = ""
) -> Figure | None:
    """Which module worked when, over the newest turns that were written."""
    found = [record for record in records if record.get("turns")]
    if not found:
        return None
    turns, unit = found[-1]["turns"], found[-1]["unit"]
    colors = _colors(records, [f"module_{k}" for k, _, _ in turns])
    names = [
        name for name in colors if name != "ensemble"
    ]  # of those, too, that had no turn lately
    figure, axes = _bare(title, subtitle, 1.6 + 0.4 * len(names))
    for k, name in enumerate(names):
        spans = [(a, b - a) for module, a, b in turns if module == k]
        axes.broken_barh(
            spans, (k - 0.38, 0.76), facecolors=[colors[name]], edgecolor="white", linewidth=0.6
        )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(min(turn[1] for turn in turns), max(turn[2] for turn in turns))
    axes.set_xlabel(f"{unit} up to step {found[-1]['step']:,}", fontsize=11)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    return figure


def ages_figure(records: Sequence[Record], title: str = "", subtitle: str = "") -> Figure | None:
    """How old the packets were that each module read, in packets its producer had made since; all of the run."""
    pattern = re.compile(r"replay/(module_\d+)/ages_from_(\d+)")
    newest: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            if match := pattern.fullmatch(key):
                newest.setdefault(match[1], {})[int(match[2])] = value
    counts = {name: ages for name, ages in newest.items() if sum(ages.values())}
    if not counts:
        return None
    figure, axes = _bare(title, subtitle, 4.4)
    names = sorted(counts, key=lambda name: int(name.split("_")[1]))
    colors, starts = _colors(records, names), sorted(counts[names[0]])
    width = 0.84 / len(names)
    for n, name in enumerate(names):
        share = [counts[name][start] / sum(counts[name].values()) for start in starts]
        places = np.arange(len(starts)) - 0.42 + width * (n + 0.5)
        axes.bar(places, share, 0.9 * width, color=colors[name], label=name.replace("_", " "))
    labels = [
        f"{a}" if b == a + 1 else f"{a}\N{EN DASH}{b - 1}" for a, b in itertools.pairwise(starts)
    ]
    labels.append(
        f"{starts[-1]}+" if starts[-1] > 1 else f"{starts[-1]}"
    )  # up to the size of the ring
    axes.set_xticks(range(len(starts)), labels)
    axes.set_xlabel("age of a packet when it was read, in packets of its producer", fontsize=11)
    axes.set_ylabel("share of reads", fontsize=11)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=10)
    return figure


def codec_figure(records: Sequence[Record], title: str = "", subtitle: str = "") -> Figure | None:
    """Of each hop: rate on the wire against reconstruction error, at the last record and (pale) at the earlier ones."""
    figure, axes = _bare(title, subtitle, 4.4)
    names = _heads(records, r"train/(module_\d+)/codec_error")
    colors, shown = _colors(records, names), []
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
    axes.plot([], [], ".", color=_GREY, alpha=0.5, label="earlier (pale)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [2.0**n for n in range(-4, 6)], [f"{tick:g}" for tick in ticks])
    found = [32.0 / compression for compression, _ in shown]
    axes.set_xlim(min(found) / 2.5, max(found) * 2.5)  # at least one tick
    axes.set_ylim(0.0, 1.1 * max(error for _, error in shown))
    axes.set_xlabel(
        "bits a value on the wire (of 32), labels, ids and codebooks included", fontsize=11
    )
    axes.set_ylabel("relative reconstruction error", fontsize=11)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def compare_figure(runs: Mapping[str, Sequence[Record]], title: str = "") -> Figure | None:
    """One line a run: its last module's validation accuracy, and its test accuracy as a diamond."""
    every = [record for records in runs.values() for record in records]
    figure, axes = _axes(title, "last module", "accuracy", every, len(runs))
    rows = []
    for number, (name, records) in enumerate(runs.items()):
        if modules := _heads(records, r"(?:validation|test)/(module_\d+)/accuracy"):
            validation, test = (
                series(records, f"{s}/{modules[-1]}/accuracy") for s in ("validation", "test")
            )
            color, style = _RUNS[number % len(_RUNS)], ("-", "--", ":")[number // len(_RUNS) % 3]
            _line(axes, validation, color, f"validation {name}", linewidth=1.8, linestyle=style)
            _mark(axes, test, color, f"test {name}")
            rows.append((name, color, (validation, test)))
    _table(axes, rows, ("validation", _TEST))
    return figure if rows else None


def series(records: Iterable[Record], key: str) -> Line:
    """The epochs (steps where a record has no epoch) and values of `key`, NaN where null was written."""
    found = [(_place(record), record[key]) for record in records if key in record]
    return [x for x, _ in found], [math.nan if y is None else float(y) for _, y in found]


def _records(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; --workdir must name the directory of a run that has trained"
        )
    if records := read_jsonl(path):
        return records
    raise UserError(f"{path}: holds no record yet; plot again after a log event")


def _title(workdir: Path) -> tuple[str, str]:
    """The run's name, and what summary.json knows of it: absent while the run still goes on, or if it cannot be read."""
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
        known = [
            form.format((summary | modules)[key]) for key, form in forms.items() if key in summary
        ]
    except (OSError, ValueError, TypeError):
        known = []
    name = os.fsencode(workdir.resolve().name).decode(
        "utf-8", "replace"
    )  # no font has a picture for half a character
    return name, ", ".join(known)


def _heads(records: Iterable[Record], pattern: str) -> list[str]:
    """'module_0', 'module_1', ..., 'ensemble': those with at least one key that matches."""
    keys = {key for record in records for key in record}
    found = {match[1] for key in keys if (match := re.fullmatch(pattern, key))}
    return sorted(found, key=lambda name: int(name.split("_")[1]) if "_" in name else math.inf)


def _colors(records: Iterable[Record], names: Sequence[str]) -> dict[str, Any]:
    """Light to dark with depth, a module's own in every picture of a run; yellow, the lightest end, vanishes on white."""
    keys = itertools.chain(names, *records)
    modules = 1 + max(
        (int(number) for key in keys for number in re.findall(r"module_(\d+)", key)), default=0
    )
    shades = matplotlib.colormaps["viridis_r"](
        np.linspace(0.2, 0.95, modules) if modules > 1 else [0.8]
    )
    return {f"module_{k}": shade for k, shade in enumerate(shades)} | {"ensemble": _ENSEMBLE}


def _place(record: Record) -> float:
    epoch = record.get("epoch")
    return float(record.get("step", 0) if epoch is None else epoch)


def _axes(
    title: str, subtitle: str, ylabel: str, records: Sequence[Record], rows: int
) -> tuple[Figure, Axes]:
    figure, axes = _bare(title, subtitle, max(4.4, 0.24 * rows + 1.6))
    places = [_place(record) for record in records]
    left, right = min(places, default=0.0), max(places, default=1.0)
    axes.set_xlim(min(left, 0.0) if right > 0 else -0.5, right or 0.5)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=right >= 4, steps=[1, 2, 5, 10]))
    axes.set_xlabel(
        "epoch" if any(record.get("epoch") is not None for record in records) else "step",
        fontsize=11,
    )
    axes.set_ylabel(ylabel, fontsize=11)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    return figure, axes


def _bare(title: str, subtitle: str, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches with one pair of axes."""
    figure = Figure(figsize=(8.6, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=10, color=_GREY)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    if subtitle:
        offset = ScaledTranslation(0, 6 / 72, figure.dpi_scale_trans)
        axes.text(0, 1, subtitle, fontsize=10, color=_GREY, transform=axes.transAxes + offset)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24 if subtitle else 10)
    return figure, axes


def _line(axes: Axes, data: Line, color: Any, label: str, **style: Any) -> None:
    if data[0]:
        # One point makes no line: a run of a single evaluation still shows a dot.
        marker = "o" if len(data[0]) == 1 else ""
        axes.plot(
            *data,
            color=color,
            label=label,
            marker=marker,
            markersize=4,
            solid_capstyle="round",
            **style,
        )


def _mark(axes: Axes, data: Line, color: Any, label: str) -> None:
    """The newest test result: an extended run holds one for each of its ends."""
    if data[0]:
        end = (data[0][-1:], data[1][-1:])
        axes.plot(
            *end,
            "D",
            color=color,
            markersize=6,
            markeredgecolor="white",
            label=label,
            clip_on=False,
            zorder=5,
        )


def _table(axes: Axes, rows: Iterable[Row], header: Sequence[str], form: str = ".3f") -> None:
    """To the right of the axes: the newest values of each row's lines, and its name.

    A row stands as near to the end of its first line as the others allow, tied to it by a thin leader.
    """
    height = axes.figure.bbox.height / axes.figure.dpi - 1.4  # of the axes, roughly, in inches
    ends = [
        (n, c, [[(x, y) for x, y in zip(*ln) if math.isfinite(y)][-1:] for ln in lines])
        for n, c, lines in rows
    ]
    tied = [
        (next(end[0] for end in found if end), name, color, found)
        for name, color, found in ends
        if any(found)
    ]
    if not tied:
        return
    tied.sort(key=lambda row: row[0][1])
    (
        axes.get_xlim(),
        axes.get_ylim(),
    )  # the limits follow the lines only when asked for, and the transform does not ask
    to_axes = (
        axes.transScale + axes.transLimits
    )  # fractions of the axes, whatever the layout will be
    wanted = np.array([to_axes.transform(point)[1] for point, *_ in tied])
    # Least squares under a smallest gap: once the gaps below are taken off, the places need only be in order.
    gap = min(0.2 / height, 1 / max(1, len(tied) - 1))
    gaps = gap * np.arange(len(tied))
    places = np.clip(_increasing(wanted - gaps), 0, 1 - gaps[-1]) + gaps

    def right(points: float) -> Any:
        return axes.transAxes + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    used = [n for n in range(len(header)) if any(found[n] for *_, found in tied)]
    spots = {n: 76 + (54 if len(used) > 1 else 0) * column for column, n in enumerate(used)}
    for n, spot in spots.items():
        style: dict[str, Any] = {"va": "center", "ha": "right", "fontsize": 8, "color": _GREY}
        axes.text(1, places[-1] + 1.1 * gap, header[n], transform=right(spot), **style)
    for (point, name, color, found), place in zip(tied, places):
        style = {"va": "center", "fontsize": 10, "color": color}
        for n, spot in spots.items():
            text = format(found[n][0][1], form) if found[n] else ""
            axes.text(1, place, text, ha="right", transform=right(spot), **style)
        axes.text(
            1, place, name, transform=right(max(spots.values()) + 14), fontweight="bold", **style
        )
        arrow = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.8,
            "linestyle": ":",
            "shrinkA": 0,
            "shrinkB": 3,
        }
        axes.annotate(
            "", point, (1, place), textcoords=right(26), arrowprops=arrow, annotation_clip=False
        )


def _increasing(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The nondecreasing values nearest in least squares: neighbours out of order share their mean."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] += (mean - means[-1]) * count / (count + counts[-1])
            counts[-1] += count
    return np.repeat(means, counts)


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with writing(str(path)):
        write_atomically({path: picture.getvalue()})
    return path
