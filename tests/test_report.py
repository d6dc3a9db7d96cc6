"""Reports of the runs below a folder: reading, rows, groups, numbers, and damaged runs."""

import json
import os
import re

import pytest
from reports import grid, report_of, texts
from runs import small_config
from written_runs import write_run

from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.run.workdir import load_settings, lock
from dgl_jax.tools.commands import shell_command
from dgl_jax.tools.report import report_runs
from dgl_jax.tools.report_curves import BOX, Line, panel, thinned
from dgl_jax.tools.report_groups import Row
from dgl_jax.tools.report_runs import read_runs
from dgl_jax.tools.report_tables import bytes_text, results
from dgl_jax.train import train_and_evaluate


def test_unfinished_runs_are_shown_and_not_averaged(tmp_path):
    write_run(tmp_path / "a" / "seed_0", [0.5, 0.6], 0.6)
    write_run(tmp_path / "a" / "seed_1", seed=1, steps=5)
    report = report_of(tmp_path)
    (group,) = report.groups
    assert texts(results(group), "run", "seeds", "last module, %", "state") == [
        ["a", "1 of 2", "60.00", "1 finished, 1 unfinished"]
    ]
    assert [(run.name, run.state, run.progress()) for run in report.problems] == [
        ("a/seed_1", "unfinished", "step 5 of 12")
    ]


def test_total_of_a_run_in_epochs_is_estimated(tmp_path):
    write_run(tmp_path, steps=5, train__steps=0, train__epochs=3.0)
    (run,), _ = read_runs(tmp_path)
    assert (run.name, run.progress()) == (".", "step 5 of 18")


def sweep(root, rows):
    (root / "sweep.json").write_text(json.dumps({"sweep": "heads.py", "rows": rows}))


def row(state: str, **fields) -> dict:
    return {"state": state, "command": f"python launch.py --{state}", "error": None} | fields


def test_sweep_adds_order_states_errors_and_commands(tmp_path):
    for n, name in enumerate(("c", "b", "a")):
        write_run(tmp_path / "sub" / name, [0.1, 0.2] if name == "a" else None, 0.1, seed=n)
    rows = {"b": row("failed", error="boom <b>"), "a": row("finished"), "c": row("running")}
    sweep(tmp_path / "sub", rows | {"d/e": row("waiting"), "/etc": row("waiting"), "../x": {}})
    report = report_of(tmp_path)

    def settings_of(name: str):
        return load_settings(tmp_path / "sub" / name / "config.json")

    assert [(run.name, run.state, run.problem, run.command) for run in report.runs] == [
        ("sub/b", "failed", "boom <b>", shell_command(settings_of("b"), tmp_path / "sub" / "b")),
        ("sub/a", "finished", "", shell_command(settings_of("a"), tmp_path / "sub" / "a")),
        # Nothing holds its lock: the sweep was killed.
        ("sub/c", "stopped", "", shell_command(settings_of("c"), tmp_path / "sub" / "c")),
        ("sub/d/e", "waiting", "", "python launch.py --waiting"),
    ]
    html, md = report_runs(tmp_path)
    assert "boom &lt;b&gt;" in html.read_text()
    assert r"boom \<b\>" in md.read_text()
    assert "sub/d/e" in html.read_text()


def test_run_is_running_as_long_as_its_folder_is_locked(tmp_path):
    write_run(tmp_path / "alone")
    assert [run.state for run in report_of(tmp_path).runs] == ["unfinished"]
    with lock(tmp_path / "alone"):
        assert [run.state for run in report_of(tmp_path).runs] == ["running"]


def test_row_of_a_killed_sweep_that_had_not_begun_is_stopped(tmp_path):
    sweep(tmp_path, {"a": row("running")})
    with lock(tmp_path):
        assert [run.state for run in report_of(tmp_path).runs] == ["running"]
    assert [run.state for run in report_of(tmp_path).runs] == ["stopped"]


def test_sweep_that_cannot_be_read_is_a_note(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6], 0.6)
    for content in ("{", "[]", "{}", '{"rows": [1]}'):
        (tmp_path / "sweep.json").write_text(content)
        report = report_of(tmp_path)
        assert len(report.notes) == 1
        assert [run.state for run in report.runs] == ["finished"]


def test_finished_run_of_a_sweep_without_summary_is_unfinished(tmp_path):
    write_run(tmp_path / "a")
    sweep(tmp_path, {"a": row("finished")})
    (run,) = report_of(tmp_path).runs
    assert (run.state, run.problem[:12]) == ("unfinished", "summary.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"3", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_damaged_json_is_a_row_that_cannot_be_read(name, content, tmp_path):
    write_run(tmp_path / "good", [0.5, 0.6], 0.6)
    write_run(tmp_path / "bad", [0.5, 0.6], 0.6, seed=1)
    (tmp_path / "bad" / name).write_bytes(content)
    report = report_of(tmp_path)
    states = {run.name: run.state for run in report.runs}
    assert states == {"good": "finished", "bad": "cannot be read"}
    assert [run.problem.startswith(f"bad/{name}: ") for run in report.problems] == [True]
    html, md = report_runs(tmp_path)
    assert "cannot be read" in html.read_text()
    assert "cannot be read" in md.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"modules": [{}, {"test_accuracy": "high"}]},
        {"modules": [], "ensemble_accuracy": True, "images_per_second": None},
        {"modules": [{"test_accuracy": float("nan")}], "wire_bytes_per_image": "many"},
        {"staleness": [None], "peak_memory_bytes": {"gpu:0": None}, "peak_host_bytes": 10**400},
        {"peak_memory_bytes": {}, "cpu_threads": None, "wire_bytes_per_image": [None]},
    ],
)
def test_odd_summaries_do_not_break_the_report(changes, tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6], 0.6, summary=changes)
    html, md = report_runs(tmp_path)
    assert "nan" not in md.read_text()
    assert "finished" in html.read_text()


def test_configuration_of_another_version_is_a_row_without_command(tmp_path):
    write_run(tmp_path / "new", [0.5, 0.6], 0.6)
    write_run(tmp_path / "old", [0.5, 0.7], 0.7)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["engine"]["fuel"] = 3
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    new, old = report_of(tmp_path).runs
    assert (old.state, old.command) == ("finished", "")
    assert old.problem.startswith("no command: config.engine.fuel: no such field")
    assert new.command.startswith("python launch.py --config=configs/")
    assert "70.00" in report_runs(tmp_path)[1].read_text()


def test_damaged_metrics_cost_only_the_damaged_lines(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6], 0.6, steps=12)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[4], lines[5] = "\x00{", '{"step": "six", "epoch": null, "train/module_0/loss": 1e999}'
    path.write_text("\n".join(lines) + '\n{"step": 13, "epo')  # being written
    (run,) = report_of(tmp_path).runs
    assert (run.state, run.problem) == ("finished", "metrics.jsonl: line 5 cannot be read")
    assert len(run.curves["train", 0, "loss"][0]) == 10
    path.unlink()
    (run,) = report_of(tmp_path).runs
    assert (run.state, run.problem, dict(run.curves)) == ("finished", "", {})


def test_exported_networks_checkpoints_and_odd_names(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6], 0.6)
    for folder in ("run/checkpoints/6", "run/plots/x"):
        write_run(tmp_path / folder)
    (tmp_path / "exported").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "exported" / name).write_text("{}")
    odd = os.fsdecode(b"caf\xe9 | `x` \n")
    write_run(tmp_path / odd, [0.5, 0.6], 0.6, seed=1)
    runs, _ = read_runs(tmp_path)
    assert [run.name for run in runs] == ["caf? | `x` \n", "run"]
    _, md = report_runs(tmp_path)
    assert r"caf? \| \`x\`" in md.read_text()


def test_curves_of_a_row_are_means_of_its_finished_runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", [0.5, 0.6], 0.6, steps=12, seed=seed)
    write_run(tmp_path / "2", steps=3, seed=2)
    path = tmp_path / "1" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"validation/module_1/accuracy": 0.2,', ""))
    path.write_text(path.read_text().replace('accuracy": 0.35', 'accuracy": 0.45'))
    (member,) = report_of(tmp_path).groups[0].rows
    epochs, values = member.curve("validation", -1, "accuracy")
    # Steps 3, 6, 9 and 12; run 1 has nothing at step 3, and 0.45 instead of 0.35 at step 6.
    assert epochs == [1.0, 1.5, 2.0]
    assert values == pytest.approx([0.4, 0.5, 0.65])


def test_runs_measured_at_other_epochs_show_the_first_curve(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", [0.5, 0.6], 0.6, steps=6, seed=seed)
    path = tmp_path / "1" / "metrics.jsonl"
    path.write_text(re.sub(r'"epoch": ([\d.]+)', r'"epoch": 9\1', path.read_text()))
    (member,) = report_of(tmp_path).groups[0].rows
    assert member.curve("validation", 0, "accuracy") == ([0.5, 1.0], [0.15, 0.3])


def drawn(svg: str) -> list[tuple[float, float]]:
    pairs = re.findall(r"(-?[\d.]+),(-?[\d.]+)", "".join(re.findall(r'points="(.*?)"', svg)))
    return [(float(x), float(y)) for x, y in pairs]


def test_points_of_a_curve_by_hand():
    svg = panel("loss", [Line(0, "a", ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]))], False, 200)
    left, top, right, bottom = BOX
    middle = ((left + right) / 2, (top + bottom) / 2)
    assert drawn(svg) == [(left, bottom), middle, (right, top)]
    # Ticks 1, 10, 100: the logarithmic axis puts 10 in the middle.
    svg = panel("loss", [Line(0, "a", ([0.0, 1.0, 2.0], [1.0, 10.0, 100.0]))], False, 200)
    assert drawn(svg) == [(left, bottom), middle, (right, top)]
    # As an accuracy the same values are in percent, on a linear axis from 0.
    svg = panel("a", [Line(0, "a", ([0.0, 1.0, 2.0], [0.0, 0.1, 1.0]))], True, 200)
    assert drawn(svg)[1][1] == pytest.approx(bottom - 0.1 * (bottom - top), abs=0.5)
    assert ">100</text>" in svg


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [1e-300, 1e99],
        [-5.0, 5.0],
        [9.999999999999999e-4, 0.0101],
        [1e-320, 2e-320],
        [2.0, 2.0 + 1e-12],
    ],
)
def test_extreme_curves_stay_in_their_box(values):
    for percent in (True, False):
        points = drawn(panel("x", [Line(0, "a", ([0.0, 1e-9], values))], percent, 200))
        assert len(points) == 2
        assert all(BOX[0] <= x <= BOX[2] and BOX[1] <= y <= BOX[3] for x, y in points)


def test_thinned_curve_keeps_both_ends():
    curve = ([float(n) for n in range(1001)], [float(-n) for n in range(1001)])
    xs, ys = thinned(curve, 5)
    assert xs == [0, 250, 500, 750, 1000]
    assert ys == [0, -250, -500, -750, -1000]
    assert thinned(curve, 1001) == curve


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1023.96, "1.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (3000 * 2**40, "3,000.0 TiB"),
    ],
)
def test_bytes_are_written_for_people(value, text):
    assert bytes_text(value) == text


def test_markdown_table_is_aligned(tmp_path):
    grid(tmp_path, ("linear", "mlp"), (0.2, 0.05))
    _, md = report_runs(tmp_path)
    tables = re.findall(r"(?:^\|.*\n)+", md.read_text(), re.M)
    assert len(tables) == 4
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.medium
def test_page_is_one_small_file_that_names_no_address(tmp_path):
    lines = []
    for step in range(1, 401):
        line = {"step": step, "epoch": step / 20, "time": 0.0}
        names = [f"{split}/module_{k}" for split in ("train", "validation") for k in range(6)]
        line |= {f"{name}/{m}": 1 / step for name in names for m in ("accuracy", "loss")}
        lines.append(json.dumps(line) + "\n")
    for n in range(100):
        folder = tmp_path / f"some_name_of_a_sweep/row_{n}"
        write_run(folder, [0.5] * 6, 0.6, optimizer__learning_rate=0.001 * (n + 1))
        (folder / "metrics.jsonl").write_text("".join(lines))
    html, _ = report_runs(tmp_path)
    assert html.stat().st_size < 1_000_000
    text = html.read_text()
    assert len(re.findall("<polyline", text)) == 2800
    assert re.findall(r"https?:|src=|@import|url\(", text) == []


def test_report_needs_a_folder_with_runs_and_a_writable_page(tmp_path):
    write_run(tmp_path / "runs" / "a", [0.5, 0.6], 0.6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.md").mkdir()
    for arguments, message in (
        ((tmp_path / "nowhere",), r"--workdir=.*nowhere: no such folder"),
        ((tmp_path / "empty",), r"--workdir=.*empty: no run below this folder"),
        ((tmp_path / "runs", tmp_path / "page.pdf"), r"--output=.*page.pdf: must end in \.html"),
        ((tmp_path / "runs", tmp_path / "page.html"), r"--output=.*page.html: cannot write there"),
        ((tmp_path / "runs", "/proc/x/page.html"), "--output=/proc/x/page.html: cannot write"),
    ):
        with pytest.raises(UserError, match=message) as error:
            report_runs(*arguments)
        assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
    assert list((tmp_path / "empty").iterdir()) == []
    paths = report_runs(tmp_path / "runs", tmp_path / "new" / "page.html")
    assert [path.name for path in paths] == ["page.html", "page.md"]


@pytest.mark.slow
def test_report_of_real_runs(tmp_path):
    summary = train_and_evaluate(small_config(), tmp_path / "a")
    train_and_evaluate(small_config(engine__name="simulated"), tmp_path / "b")
    assert summary.peak_memory_bytes is None  # on a CPU
    assert summary.peak_host_bytes > 2**20
    (group,) = report_of(tmp_path).groups
    one, other = group.rows
    assert one.accuracy(-1).mean == summary.modules[-1]["test_accuracy"]
    assert one.runs[0].curves.keys() == other.runs[0].curves.keys()
    assert one.runs[0].curves["validation", 1, "accuracy"][0] == [1.0, 2.0]
    assert (one.staleness(), other.staleness().count) == (None, 1)
    assert one.runs[0].step == one.runs[0].total == 12
    assert isinstance(one, Row)
    assert make_settings(small_config()).hash() == summary.config_hash
