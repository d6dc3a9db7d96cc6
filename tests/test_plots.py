"""Plots contain the curves of the records, and report missing metrics."""

import contextlib
import itertools
import json
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from dgl_jax.errors import UserError
from dgl_jax.run import plots
from dgl_jax.run.axes import _increasing
from dgl_jax.run.plots import (
    accuracy_figure,
    compare,
    compare_figure,
    convergence_figure,
    loss_figure,
    plot,
    series,
)
from dgl_jax.run.writers import JsonLinesWriter, read_jsonl

PNG = b"\x89PNG\r\n\x1a\n"


def make_records(modules, epochs=3, heads=None, ensemble=True):
    """Returns records with training every half epoch, validation every epoch, test at the end."""
    heads, records = range(modules) if heads is None else heads, []
    for half in range(1, 2 * epochs + 1):
        head = {"step": 5 * half, "epoch": half / 2, "time": 0.0}
        accuracies = {k: 1 - 1 / (half + k + 2) for k in heads}
        losses = {f"train/module_{k}/loss": 3.0 * 0.3**half / (k + 1) for k in heads}
        records.append(
            head | losses | {f"train/module_{k}/accuracy": a for k, a in accuracies.items()}
        )
        splits = ["validation"] * (half % 2 == 0) + ["test"] * (half == 2 * epochs)
        for split in splits:
            records.append(
                head | {f"{split}/module_{k}/accuracy": a - 0.05 for k, a in accuracies.items()}
            )
            records[-1] |= {f"{split}/ensemble/accuracy": 0.9} if ensemble else {}
    return records


def make_run(workdir, records):
    with contextlib.closing(JsonLinesWriter(workdir / "metrics.jsonl")) as writer:
        for record in records:
            scalars = {key: math.nan if value is None else value for key, value in record.items()}
            writer.write_scalars(scalars.pop("step"), scalars)
    return workdir


def drawn(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("modules", [1, 4, 10])
def test_accuracy_plot_has_one_line_per_module_and_split(modules):
    figure = accuracy_figure(make_records(modules, ensemble=modules > 1), "run", "fused")
    lines = drawn(figure)
    ensembles = (
        2 if modules > 1 else 0
    )  # validation and test; there is no training accuracy of the ensemble
    assert len(figure.axes[0].lines) == len(lines) == 3 * modules + ensembles
    np.testing.assert_array_equal(lines["validation module_0"].get_xdata(), [1, 2, 3])
    assert len(lines["train module_0"].get_xdata()) == 6
    assert list(lines["test module_0"].get_xdata()) == [3]
    assert lines["train module_0"].get_alpha() < 0.5
    assert figure.axes[0].get_title(loc="left") == "run"
    value = f"{lines['test module_0'].get_ydata()[0]:.3f}"
    assert value in texts(figure)


def test_colors_darken_with_depth_and_agree_between_plots():
    records = make_records(6)
    accuracy, loss = drawn(accuracy_figure(records)), drawn(loss_figure(records))
    shades = [accuracy[f"validation module_{k}"].get_color() for k in range(6)]
    assert np.all(np.diff([np.dot(shade[:3], [0.3, 0.6, 0.1]) for shade in shades]) < 0)
    for k in range(6):
        np.testing.assert_array_equal(accuracy[f"train module_{k}"].get_color(), shades[k])
        np.testing.assert_array_equal(loss[f"train module_{k}"].get_color(), shades[k])


def test_row_names_do_not_overlap():
    records = [
        {"step": 1, "epoch": 1.0} | {f"validation/module_{k}/accuracy": 0.9 for k in range(30)}
    ]
    figure = accuracy_figure(records)
    figure.canvas.draw()
    boxes = [
        t.get_window_extent() for t in figure.axes[0].texts if t.get_text().startswith("module")
    ]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 30
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1
    assert boxes[0].y0 >= 0


def middle(figure, label):
    """Returns the vertical center of a label in pixels."""
    (text,) = [text for text in figure.axes[0].texts if text.get_text() == label]
    box = text.get_window_extent()
    return (box.y0 + box.y1) / 2


@pytest.mark.parametrize("last", [0.9, 0.62, 0.3])
def test_labels_are_at_the_ends_of_their_lines(last):
    runs = {
        "a": [{"step": s, "validation/module_0/accuracy": y} for s, y in ((1, 0.1), (2, last))],
        "b": [{"step": s, "validation/module_0/accuracy": y} for s, y in ((1, 0.15), (2, 0.45))],
    }
    losses = [
        {"step": s, "train/module_0/loss": y, "train/module_1/loss": 2 * y}
        for s, y in ((1, 2.5), (2, last))
    ]
    # Enough decades for a logarithmic axis.
    steep = [{"step": 0, "train/module_0/loss": 60.0, "train/module_1/loss": 70.0}, *losses]
    for figure, ends in (
        (compare_figure(runs), {"a": last, "b": 0.45}),
        (loss_figure(losses), {"module 0": last, "module 1": 2 * last}),
        (loss_figure(steep), {"module 0": last, "module 1": 2 * last}),
    ):
        figure.canvas.draw()
        axes = figure.axes[0]
        for label, y in ends.items():
            # 6 pixels are 3 points: text is not exactly centered in its box, and rows are 14 points
            # apart.
            assert middle(figure, label) == pytest.approx(
                axes.transData.transform((2, y))[1], abs=6
            )


def test_increasing_averages_values_out_of_order():
    assert _increasing([1.0, 2.0, 2.5]).tolist() == [1, 2, 2.5]
    assert _increasing([3.0, 1.0, 2.0]).tolist() == [2, 2, 2]
    assert _increasing([1.0, 3.0, 2.0, 4.0]).tolist() == [1, 2.5, 2.5, 4]
    assert _increasing([4.0, 5.0, 0.0, 3.0, 9.0]).tolist() == [3, 3, 3, 3, 9]
    assert _increasing([7.0]).tolist() == [7]


@pytest.mark.parametrize("value", [2.0, 0.0123, 0.00123, 0.000123, 1.23e-5])
def test_dotted_lines_end_before_the_numbers(value):
    records = [
        {"step": s, "train/module_0/loss": value * m, "train/module_1/loss": 1.01 * value * m}
        for s, m in ((1, 3), (2, 1))
    ]
    figure = loss_figure(records)
    figure.canvas.draw()
    texts = figure.axes[0].texts
    numbers = [text.get_window_extent().x0 for text in texts if text.get_text()[:1].isdigit()]
    leaders = [
        text.arrow_patch.get_window_extent().x1
        for text in texts
        if getattr(text, "arrow_patch", None)
    ]
    assert len(numbers) == len(leaders) == 2
    assert max(leaders) + 2 < min(numbers)


def test_module_without_a_head_has_no_line():
    records = make_records(4, heads=[3], ensemble=False)
    assert set(drawn(accuracy_figure(records))) == {
        "train module_3",
        "validation module_3",
        "test module_3",
    }
    assert set(drawn(loss_figure(records))) == {"train module_3"}


def test_loss_axis_is_logarithmic_only_for_a_wide_range():
    assert loss_figure(make_records(2)).axes[0].get_yscale() == "log"
    assert loss_figure(make_records(2, epochs=1)).axes[0].get_yscale() == "linear"


def test_null_breaks_a_line_and_steps_replace_missing_epochs():
    key = "train/module_0/loss"
    records = [
        {"step": 1, key: 2.0},
        {"step": 2, key: None},
        {"step": 3, "learning_rate": 0.1},
        {"step": 4, key: 1.0},
    ]
    x, y = series(records, key)
    assert x == [1, 2, 4]
    np.testing.assert_array_equal(y, [2, np.nan, 1])
    figure = loss_figure(records)
    assert figure.axes[0].get_xlabel() == "step"
    assert "1.00" in texts(figure)


@pytest.mark.parametrize("value", [math.nan, 0.0, 1.0])
def test_extreme_values_are_drawn(tmp_path, value):
    records = [
        {
            "step": 0,
            "epoch": 0.0,
            "train/module_0/loss": value,
            "validation/module_0/accuracy": value,
        }
    ]
    assert len(plot(make_run(tmp_path, records))) == 2


@pytest.mark.parametrize("finished", [False, True])
def test_plot_writes_png_files(tmp_path, finished):
    workdir = make_run(tmp_path / "digits", make_records(4))
    if finished:
        summary = {
            "engine": "fused",
            "steps": 30,
            "seed": 1,
            "modules": [{}] * 4,
            "ensemble_accuracy": 0.9,
        }
        (workdir / "summary.json").write_text(json.dumps(summary))
    paths = plot(str(workdir))
    assert paths == [workdir / "plots" / "accuracy.png", workdir / "plots" / "loss.png"]
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["x$^$y", "\u56fe"])  # no formula, and no glyph in the font
def test_the_name_of_a_run_is_drawn_as_it_is(tmp_path, name):
    with matplotlib.rc_context({"text.usetex": True}):  # there is no LaTeX here
        assert len(plot(make_run(tmp_path / name, make_records(4)))) == 2
        assert matplotlib.rcParams["text.usetex"]


def test_plot_names_a_value_that_is_not_a_number(tmp_path):
    record = {"step": 1, "epoch": 0.1, "train/module_0/loss": "x"}
    lines = "".join(json.dumps(record | {"step": step}) + "\n" for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(
        UserError, match="train/module_0/loss is 'x' in a record of metrics, not a number"
    ):
        plot(tmp_path)


def test_plot_draws_only_available_metrics(tmp_path):
    records = [{"step": 1, "epoch": 0.1, "train/module_0/loss": 2.0}]
    assert [path.name for path in plot(make_run(tmp_path, records))] == ["loss.png"]


def test_plot_reports_missing_metrics(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tra')
    with pytest.raises(UserError, match="no record yet"):
        plot(tmp_path)
    make_run(tmp_path, [{"step": 1, "epoch": 0.1, "learning_rate": 0.1}])
    with pytest.raises(UserError, match="no accuracy and no loss"):
        plot(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_compare_draws_the_last_module_of_workdirs_and_records(tmp_path):
    workdir = make_run(tmp_path / "run", make_records(4))
    other = make_records(4, epochs=2, heads=[3], ensemble=False)
    path = compare({"DGL": workdir, "backprop": other}, tmp_path / "out" / "compare.png", "Digits")
    assert path.read_bytes().startswith(PNG)
    figure = compare_figure({"DGL": read_jsonl(workdir / "metrics.jsonl"), "backprop": other})
    lines = drawn(figure)
    assert set(lines) == {"validation DGL", "test DGL", "validation backprop", "test backprop"}
    for label, records in (("DGL", make_records(4)), ("backprop", other)):
        np.testing.assert_allclose(
            lines[f"validation {label}"].get_ydata(),
            series(records, "validation/module_3/accuracy")[1],
        )
    with pytest.raises(UserError, match="DGL"):
        compare({"DGL": [{"step": 1}]}, tmp_path / "none.png")


def test_ages_plot_shows_shares_of_reads():
    records = [
        {"step": n, "replay/module_1/ages_from_0": 3.0 * n, "replay/module_1/ages_from_1": 1.0 * n}
        for n in (1, 2)
    ]
    (axes,) = plots.ages_figure(records).axes
    assert [bar.get_height() for bar in axes.patches] == [0.75, 0.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert plots.ages_figure([{"step": 1, "replay/module_1/ages_from_0": 0.0}]) is None


def test_timeline_shows_the_newest_turns():
    records = [
        {"step": 3, "unit": "turns", "turns": [[0, 5.0, 6.0]]},
        {"step": 6, "unit": "seconds", "turns": [[1, 2.0, 4.0], [0, 1.0, 2.0]]},
    ]
    (axes,) = plots.timeline_figure(records).axes
    assert axes.get_xlim() == (1.0, 4.0)
    assert axes.get_xlabel() == "seconds up to step 6"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["module 0", "module 1"]
    spans = [path.vertices[:, 0] for bars in axes.collections for path in bars.get_paths()]
    assert [(x.min(), x.max()) for x in spans] == [(1.0, 2.0), (2.0, 4.0)]
    assert plots.timeline_figure([{"step": 3}]) is None
    # Module 2 finished before the others and has no recent turn.
    (axes,) = plots.timeline_figure([*records, {"step": 6, "train/module_2/loss": 1.0}]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "module 0",
        "module 1",
        "module 2",
    ]
    assert axes.get_ylim() == (2.5, -0.5)


def test_records_of_turns_do_not_stretch_the_axis_of_epochs():
    records = make_records(2)
    turns = {"step": 300, "time": 0.0, "unit": "turns", "turns": [[0, 1.0, 2.0]]}
    for figure in (accuracy_figure, loss_figure):
        assert figure([*records, turns]).axes[0].get_xlim() == (0.0, 3.0)


def test_module_has_the_same_color_in_every_plot():
    # The first module reads no ring and the last one sends nothing, so plots differ in modules.
    record = {f"train/module_{k}/loss": 1.0 for k in range(3)} | {"epoch": 1.0}
    record |= {f"replay/module_{k}/ages_from_0": 1.0 for k in (1, 2)}
    record |= {f"train/module_{k}/codec_error": 0.5 for k in (0, 1)} | {
        f"wire/module_{k}/compression": 4.0 for k in (0, 1)
    }
    lines = {
        line.get_label(): to_rgba(line.get_color())
        for line in plots.loss_figure([record]).axes[0].lines
    }
    bars = {
        bar.get_label(): bar.patches[0].get_facecolor()
        for bar in plots.ages_figure([record]).axes[0].containers
    }
    dots = {
        dot.get_label(): to_rgba(dot.get_color())
        for dot in plots.codec_figure([record]).axes[0].lines
    }
    assert bars == {"module 1": lines["train module_1"], "module 2": lines["train module_2"]}
    assert [dots[f"after module {k}"] for k in (0, 1)] == [
        lines[f"train module_{k}"] for k in (0, 1)
    ]


def test_convergence_plot_has_the_running_minimum_beside_the_drift_sum():
    squares = {0: (4.0, 1.0, 2.0), 1: (8.0, 9.0, None)}
    records = [
        {"step": 5 * n, "epoch": n}
        | {f"diagnostics/module_{k}/gradient_squared": squares[k][n] for k in (0, 1)}
        | ({"diagnostics/module_1/mmd": 0.1 * n} if n else {})
        for n in range(3)
    ]
    assert convergence_figure(make_records(2)) is None
    left, right = convergence_figure(records).axes
    minima = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert minima == {"module 0": [4, 1, 1], "module 1": [8, 8, 8]}
    (drift,) = right.lines
    assert list(drift.get_xdata()) == [1, 2]
    assert list(drift.get_ydata()) == [0.1, 0.2]
    assert "last probe" in right.get_ylabel()
    # The end of the run adds lines with the steps of the probes.
    records += [
        {"step": 5 * n, "epoch": n, "final/module_1/weighted_drift": 0.5 / n} for n in (1, 2)
    ]
    _, right = convergence_figure(records).axes
    (drift,) = right.lines
    assert list(drift.get_ydata()) == [0.5, 0.25]
    assert "drift sum" in right.get_ylabel()
