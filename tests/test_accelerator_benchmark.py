"""The benchmark of an accelerator: its time budget, its order, its file, and its rows at work."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.accelerator import images, peers, resuming, run
from benchmarks.accelerator.common import configured, fitting
from benchmarks.accelerator.measuring import cnn6
from benchmarks.accelerator.modes import MODES
from benchmarks.accelerator.rows import SIZES, Job, Row, Skipped
from benchmarks.accelerator.switches import SWITCHES
from dgl_jax import cli
from dgl_jax.config import make_settings
from dgl_jax.config.registry import CODECS, DATA_SETS, ENGINES, METHODS
from dgl_jax.data import make_source
from dgl_jax.run.parts import known_info

ROOT = Path(__file__).parents[1]

# Rows that need no library. A worker of the benchmark is this file, started with --worker.
FAKES = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.accelerator import run
from benchmarks.accelerator.rows import Row, Skipped

def figure(job):
    print("not an answer")
    return {{"pid": os.getpid(), "earlier": sorted(job.results), "shared": len(job.shared)}}

def leaves(job):
    job.shared["left"] = 1
    return figure(job)

def skipped(job):
    raise Skipped("no such field")

def fails(job):
    raise ValueError("a bug\\nwith details")

def crashes(job):
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(7)

def hangs(job):
    if os.fork() == 0:
        time.sleep(600)
    open(os.path.join({folder!r}, "hanging"), "w").write(str(os.getpgrp()))
    time.sleep(600)

def rows(size):
    fake = lambda name, measure, cost=1.0, **other: Row(name, "a", measure, cost, "one", **other)
    return [
        fake("late", figure, rank=1),
        fake("first", leaves),
        fake("second", figure),
        Row("other group", "b", figure, 1.0, "one"),
        Row("other process", "b", figure, 1.0, "two"),
        fake("skipped", skipped),
        fake("fails", fails),
        fake("crashes", crashes),
        fake("after", figure),
        fake("hangs", hangs, rank=2),
        fake("too long", figure, cost=1e6, rank=3),
        fake("never", figure, rank=3),
    ]

def main(argv=None):
    run.main(argv, rows, __file__, lambda: {{"devices": ["fake card"], "platform": "cpu"}})

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def fakes(tmp_path):
    """Returns a file with rows that need no library."""
    script = tmp_path / "fakes.py"
    script.write_text(FAKES.format(root=str(ROOT), folder=str(tmp_path)))
    return script


@pytest.fixture
def registry(monkeypatch):
    """Removes the data sets of the benchmark after a test."""
    monkeypatch.setattr(DATA_SETS, "_kinds", dict(DATA_SETS.items()))


def command(script, *flags):
    return [sys.executable, str(script), *flags, f"--output={script.parent / 'result.json'}"]


def written(script):
    return json.loads((script.parent / "result.json").read_text())


def gone(group):
    """Returns True if no process of a group is left; one that was killed may end a bit later."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.medium
def test_every_row_has_a_figure_or_a_reason_whatever_other_rows_do(fakes):
    # A row sleeps for ten minutes, so that the command must stop it.
    flags = {"capture_output": True, "text": True, "check": True, "timeout": 300}
    done = subprocess.run(command(fakes, "--minutes=0.2", "--size=full"), **flags, cwd=fakes.parent)
    result = written(fakes)
    assert result["finished"]
    assert result["card"] == "fake card"
    assert result["versions"].keys() >= {"python", "jax", "torch"}
    rows = result["rows"]
    assert list(rows) == [
        "first", "second", "skipped", "fails", "crashes", "after", "other group", "other process",
        "late", "hangs", "too long", "never",
    ]  # fmt: skip
    figures = {name: row["figures"] for name, row in rows.items() if "figures" in row}
    reasons = {name: row["reason"] for name, row in rows.items() if "reason" in row}
    assert {*figures} | {*reasons} == {*rows}
    assert not {*figures} & {*reasons}
    assert reasons.pop("hangs") == "ran out of time"
    assert reasons.pop("too long").startswith("ran out of time: ")
    assert reasons.pop("never").startswith("ran out of time: 0 s were left")
    assert reasons == {
        "skipped": "no such field",
        "fails": "ValueError: a bug",
        "crashes": "the process ended with status 7: out of luck",
    }
    # Rows share a process and what others left in it, until it crashes or has another name.
    assert figures["first"]["pid"] == figures["second"]["pid"] != figures["after"]["pid"]
    assert (figures["second"]["shared"], figures["after"]["shared"]) == (1, 0)
    assert figures["after"]["pid"] == figures["other group"]["pid"]
    assert figures["other group"]["pid"] != figures["other process"]["pid"]
    assert figures["after"]["earlier"] == ["first", "second"]
    assert gone(int((fakes.parent / "hanging").read_text()))
    for name, row in rows.items():
        assert f"| {name} |" in done.stdout
        assert row.get("reason", "") in done.stdout


@pytest.mark.medium
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_a_whole_file_and_no_process(fakes, signum):
    output, errors = fakes.parent / "output", subprocess.DEVNULL
    with output.open("w") as out:
        process = subprocess.Popen(command(fakes), stdout=out, stderr=errors, cwd=fakes.parent)
    while not (fakes.parent / "hanging").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[signum]
    rows = written(fakes)["rows"]
    assert not written(fakes)["finished"]
    assert rows["late"]["figures"]
    assert rows["crashes"]["reason"]
    assert rows["hangs"]["reason"] == rows["never"]["reason"] == "not run yet"
    assert gone(int((fakes.parent / "hanging").read_text()))
    assert ("not run yet" in output.read_text()) == (signum == signal.SIGTERM)  # in its table


def test_only_chooses_groups_and_rows_chooses_names(fakes):
    flags = "--only=b", "--rows=other *", "--minutes=5"
    subprocess.run(command(fakes, *flags), check=True, capture_output=True, cwd=fakes.parent)
    assert list(written(fakes)["rows"]) == ["other group", "other process"]


@pytest.mark.parametrize("flag", ["--only=a,f", "--minutes=0", "--minutes=nan"])
def test_a_wrong_flag_is_refused(flag):
    with pytest.raises(SystemExit, match="2"):
        run.arguments([flag])


def test_rows_come_by_rank_and_then_by_group():
    rows = [Row(f"{r}{g}{i}", g, dict, 1, "", r) for i in (0, 1) for g in "cab" for r in (1, 0)]
    names = [row.name for row in run.ordered(rows)]
    assert names == [f"{r}{g}{i}" for r in (0, 1) for g in "abc" for i in (0, 1)]


def test_every_group_comes_early_at_reduced_sizes():
    full, small = (run.ordered(run.shipped()(size), size) for size in ("full", "small"))
    assert {row.group for row in full[:8]} == {"a"}
    assert [row.group for row in small[:8]] == ["a", "a", "b", "c", "c", "c", "d", "d"]
    assert small[0].name == "engine fused"
    assert sorted(row.name for row in small) == sorted(r.name for r in run.shipped()("small"))


@pytest.mark.parametrize("size", SIZES)
def test_rows_have_names_of_their_own_and_cover_every_kind(size):
    rows = run.shipped()(size)
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    assert {row.group for row in rows} == set(run.GROUPS)
    kinds = (("engine", ENGINES), ("codec", CODECS), ("method", METHODS), ("mode", cli._MODES))
    for kind, members in kinds:
        assert {f"{kind} {member}" for member in members} <= set(names)


def test_every_mode_has_a_function():
    assert set(MODES) == set(cli._MODES)


@pytest.mark.parametrize("size", SIZES)
def test_settings_of_the_timed_runs_are_valid(size, registry):
    fields = cnn6(SIZES[size], 8, engine__name="threads", replay__size=4)
    assert configured(fields) == make_settings(configured(fields).to_dict())


def job(tmp_path, **changed):
    defaults = {"platform": "cpu", "results": {}, "deadline": time.monotonic() + 600}
    return Job(SIZES["smoke"], tmp_path, "", **defaults | changed)


def row(group, name):
    (match,) = (r for r in run.shipped(group)("smoke") if r.name == name)
    return match


def test_a_switch_without_a_field_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.accelerator.switches.field_names", lambda: ["data.name"])
    for name, value in SWITCHES:
        with pytest.raises(Skipped, match="no such field"):
            row("d", f"dgl, batch 4: {name}={value}").measure(job(tmp_path))


def test_a_flag_is_only_tried_while_undisturbed_runs_differ(tmp_path):
    resumed = "interrupted and resumed"
    one, two, three = (f"two undisturbed runs, {flag}" for flag in resuming.FLAGS)
    agree, differ = {"equal": True}, {"equal": False}
    for results, name, reason in (
        ({"two undisturbed runs": agree}, one, "agree without a flag"),
        ({"two undisturbed runs": differ, one: agree}, two, f"agree with {resuming.FLAGS[0]}"),
        ({one: differ, two: agree}, three, f"agree with {resuming.FLAGS[1]}"),
        ({resumed: agree}, f"{resumed}, with the flag", "without a flag"),
        ({one: differ}, f"{resumed}, with the flag", "no flag is known"),
        ({"two undisturbed runs": differ, resumed: agree, one: agree}, two, resuming.FLAGS[0]),
    ):
        with pytest.raises(Skipped, match=reason):
            row("b", name).measure(job(tmp_path, results=results))


@pytest.mark.medium
def test_a_batch_is_halved_until_it_fits():
    tried = []

    def attempt(batch):
        tried.append(batch)
        if batch > 16:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"batch_size": batch}

    assert fitting(128, attempt) == {"batch_size": 16}
    assert tried == [128, 64, 32, 16]
    with pytest.raises(RuntimeError, match="another"):
        fitting(128, lambda batch: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(MemoryError):  # it never fits
        fitting(8, lambda batch: (_ for _ in ()).throw(MemoryError("out of memory")))


@pytest.mark.parametrize(("name", "classes"), [(images.SMALL, 10), (images.LARGE, 1000)])
def test_generated_images_have_the_shapes_that_the_settings_promise(name, classes, registry):
    settings = configured(images.fields(name, SIZES["smoke"], 4)).data
    source, info = make_source(settings, 0), known_info(settings)
    assert (source.num_classes, source.example_shape) == (classes, info.example_shape)
    assert source.batch(3).inputs.shape == (4, *info.example_shape)
    assert source.steps_per_epoch >= 2
    assert len(info.class_names) == classes


def test_rows_of_pytorch_say_why_they_are_left_out(tmp_path, monkeypatch):
    name = "cnn6, batch 4: DGL, PyTorch CUDA graphs"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match="PyTorch is not installed"):
        row("c", name).measure(job(tmp_path))
    monkeypatch.undo()
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Skipped, match="CUDA graphs need a CUDA device"):
        row("c", name).measure(job(tmp_path))
    with pytest.raises(Skipped, match="finds no device besides the CPU"):
        row("c", name).measure(job(tmp_path, platform="gpu"))


@pytest.mark.parametrize(("name", "count"), [("resnet50", 25_557_032), ("resnet152", 60_192_808)])
def test_residual_networks_in_pytorch_have_the_published_number_of_parameters(name, count):
    torch = pytest.importorskip("torch")
    from benchmarks.accelerator.torch_resnet import resnet

    with torch.device("meta"):
        network = resnet(name, 64, 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.slow
def test_groups_a_to_d_have_figures_on_a_cpu(tmp_path):
    chosen = (
        "engine fused",
        "codec bf16",
        "method backprop",
        "mode [ebpt]*",
        "interrupted and resumed*",
        "matrix products*",
        "cnn6, batch 4: DGL, fused",
        "cnn6, batch 4: back-propagation",
        "cnn6, batch 4: DGL, threads",
        "cnn6, batch 8: DGL, fused: memory",
        "cnn6, batch 4: *PyTorch eager",
        "cnn6, batch 4: *PyTorch CUDA graphs",
        "dgl, batch 4: *",
    )
    output = tmp_path / "result.json"
    flags = ["--minutes=4", "--size=smoke", "--only=a,b,c,d", f"--output={output}"]
    flags += [f"--rows={pattern}" for pattern in chosen]
    subprocess.run([sys.executable, run.__file__, *flags], check=True, timeout=300, cwd=tmp_path)
    result = json.loads(output.read_text())
    rows, missing = result["rows"], importlib.util.find_spec("torch") is None
    assert (result["finished"], result["card"], result["size"]) == (True, "cpu", "smoke")
    reasons = {name: row["reason"] for name, row in rows.items() if "figures" not in row}
    assert {row["group"] for row in rows.values() if "figures" in row} == set("abcd")
    assert reasons.pop("interrupted and resumed, with the flag").startswith("not needed")
    for name, reason in reasons.items():
        if "PyTorch" in name:
            told = "PyTorch is not installed" if missing else "CUDA graphs need a CUDA device"
            assert reason == told
        else:  # a switch that does not exist, or not for a CPU
            assert rows[name]["group"] == "d"
            assert not re.match(r"ran out|took longer|the process ended|\w+Error", reason)
    resumed = rows["interrupted and resumed"]["figures"]
    assert (resumed["equal"], resumed["max_difference"]) == (True, 0.0)
    both = [
        rows[f"cnn6, batch 4: {name}"]["figures"] for name in ("DGL, fused", "back-propagation")
    ]
    assert both[0]["over_backprop"] == pytest.approx(both[1]["over_baseline"]["median"], abs=1e-3)
    assert both[0]["percent_of_matrix_rate"] > 0
    memory = rows["cnn6, batch 8: DGL, fused: memory"]["figures"]["peak_memory_bytes"]
    assert memory == "unknown"  # a CPU has no memory of its own


@pytest.mark.slow
def test_waits_are_measured_by_commands(tmp_path):
    output = tmp_path / "result.json"
    flags = ["--minutes=4", "--size=smoke", "--only=c", "--rows=first step*", f"--output={output}"]
    subprocess.run([sys.executable, run.__file__, *flags], check=True, timeout=300, cwd=tmp_path)
    rows = json.loads(output.read_text())["rows"]
    first, again = (
        rows[f"first step, {name} in the cache"]["figures"] for name in ("nothing", "programs")
    )
    assert first["from_the_cache"] == 0 < again["from_the_cache"] == again["programs"]
    assert 0 < first["compiling_seconds"] < first["first_step_seconds"] < first["command_seconds"]
