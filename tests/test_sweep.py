"""Tests of sweeps: checks of the rows, division of the machine, scheduling, and real processes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from ml_collections import ConfigDict
from rich.console import Console
from runs import FIELDS, same_run, small_config

from dgl_jax import child, system
from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.run.signals import Interruption
from dgl_jax.run.workdir import check, is_locked, lock
from dgl_jax.tools import jobs, rows
from dgl_jax.tools.bars import Bars
from dgl_jax.tools.estimate import Cost, Costs, Meter, kind_of, newest_record, spoken
from dgl_jax.tools.jobs import Share, shares
from dgl_jax.tools.rows import Row, make_rows
from dgl_jax.tools.sweep import Loop, Result, measure, sweep

ROOT = Path(__file__).parents[1]


def store(folder: Path, config: ConfigDict, **summary) -> None:
    """Writes the files of a run; its summary only if there are fields of it."""
    settings = make_settings(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    (folder / "checkpoints" / "4").mkdir(parents=True)
    (folder / "checkpoints" / "4" / "item").write_bytes(b"x" * 1000)
    if summary:
        values = {
            "engine": "fused",
            "method": "dgl",
            "config_hash": settings.hash(),
            "seed": 0,
            "epochs": 2.0,
            "steps": 12,
            "modules": [{"updates": 12, "test_accuracy": 0.5}],
            "ensemble_accuracy": 0.75,
            "images_per_second": 1.0,
            "wire_bytes_per_image": [],
            "raw_bytes_per_image": [],
            "wire": "simulated",
            "codebook_share": [],
            "codec_error": [],
            "wall_seconds": 24.0,
            "dataset": "synthetic",
            "versions": {},
        }
        (folder / "summary.json").write_text(json.dumps(values | summary))


# ---- rows ----


def test_fields_of_the_command_line_change_all_rows_but_not_what_the_sweep_yields():
    config = small_config()
    pairs = [("a", config), ("b", small_config(seed=1)), "no row"]
    fields = {"optimizer.learning_rate": 0.25, "train.steps": 7}
    *changed, other = rows.overridden(iter(pairs), fields)
    assert [(name, c.optimizer.learning_rate, c.train.steps, c.seed) for name, c in changed] == [
        ("a", 0.25, 7, 0),
        ("b", 0.25, 7, 1),
    ]
    assert other == "no row"
    assert config == small_config()
    assert list(rows.overridden(iter(pairs), {})) == pairs


def test_rows_of_another_sweep_stay_in_the_table(tmp_path):
    path = tmp_path / "sweep.json"
    first, second = (
        make_rows(iter([(name, small_config(seed=n)) for n, name in enumerate(names)]), tmp_path)
        for names in (("a", "b"), ("b", "c"))
    )
    first[0].state = first[1].state = "finished"
    for table in (first, second):
        rows.write(path, "name", table)
    states = {name: row["state"] for name, row in json.loads(path.read_text())["rows"].items()}
    assert states == {"a": "finished", "b": "waiting", "c": "waiting"}
    path.write_text("{")
    rows.write(path, "name", second)
    assert list(json.loads(path.read_text())["rows"]) == ["b", "c"]


def test_run_in_the_folder_of_a_sweep_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="holds the rows of a sweep"):
        check(tmp_path, make_settings(small_config()))


def test_finished_rows_are_marked_and_others_wait(tmp_path):
    store(tmp_path / "a" / "seed=0", small_config(), steps=12)
    store(tmp_path / "b", small_config(seed=1))
    store(tmp_path / "long", small_config(), steps=12)
    pairs = [("a/seed=0", small_config(log__every=5)), ("b", small_config(seed=1))]
    pairs += [("c", small_config(seed=2)), ("long", small_config(train__steps=24))]
    table = make_rows(iter(pairs), tmp_path)
    assert [(row.state, row.resumes) for row in table] == [
        ("finished", True),
        ("waiting", True),
        ("waiting", False),
        ("waiting", True),  # more steps than before: the run is extended
    ]
    assert table[0].seconds == 24.0
    assert table[0].outcome() == "test accuracy 0.5000, ensemble 0.7500"
    assert table[2].command.startswith("python launch.py --config=configs/")
    assert f"--workdir={tmp_path}/c" in table[2].command


def test_rows_may_reuse_one_configuration(tmp_path):
    config = small_config()

    def pairs():
        for seed in range(3):
            config.seed = seed
            yield f"seed={seed}", config

    assert [row.settings.seed for row in make_rows(pairs(), tmp_path)] == [0, 1, 2]


def test_a_row_that_stopped_before_its_first_checkpoint_may_change(tmp_path):
    store(tmp_path / "a", small_config(optimizer__learning_rate=1.0))
    pairs = [("a", small_config())]
    with pytest.raises(
        UserError, match=r"row a: .*config\.optimizer\.learning_rate \(was 1\.0, is"
    ):
        make_rows(pairs, tmp_path)
    (tmp_path / "a" / "checkpoints" / "4" / "item").unlink()
    assert make_rows(pairs, tmp_path)[0].state == "waiting"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "the sweep yields no rows"),
        ([3], "the sweep yields int '3'; yield pairs"),
        ([("a", {}), ("a", {})], "row a: the sweep yields this name twice"),
        ([("a/b", {}), ("a", {})], "row a/b: lies inside the folder of row a"),
        *(
            ([(name, {})], f"row {name!r}: not a valid name")
            for name in ("", "/a", "a/../b", "a b", "a[0]", "lock", "sweep.json", 7)
        ),
        ([("a", 5)], "row a: its configuration is a int"),
        ([("a", {"model": {"width": 0}})], "row a: config.model.width=0: "),
        ([("a", {"model": {"widht": 3}})], "row a: config.model.widht: no such field"),
    ],
)
def test_wrong_rows_are_refused_by_name(pairs, message, tmp_path):
    with pytest.raises(UserError) as caught:
        sweep(pairs, tmp_path / "new")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_no_folder_for_a_sweep(tmp_path):
    store(tmp_path / "run", small_config())
    with pytest.raises(UserError, match=r"--workdir=.*/run: holds a run; a sweep needs a folder"):
        sweep([("a", small_config())], tmp_path / "run")


def test_two_sweeps_cannot_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("dgl_jax.tools.sweep.backend", lambda: ("cpu", 1))
    with lock(tmp_path), pytest.raises(UserError, match="another sweep is running there"):
        sweep([("a", small_config())], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def sweep_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "file.py"
    path.write_text(text)
    return str(path)


def test_the_argument_of_a_sweep_follows_the_colon(tmp_path):
    path = sweep_file(tmp_path, "def get_sweep(argument='none'):\n    yield argument, 1\n")
    assert list(rows.load(path)) == [("none", 1)]
    assert list(rows.load(f"{path}:small:2")) == [("small:2", 1)]


@pytest.mark.parametrize("name", ["digits", "claims/digits", "configs/claims/digits.py"])
def test_a_shipped_sweep_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = make_rows(rows.load(f"{name}:tiny"), tmp_path)
    assert [row.name for row in table] == [
        "dgl/seed=0",
        "dgl/seed=1",
        "backprop/seed=0",
        "backprop/seed=1",
    ]
    assert [row.settings.method.name for row in table[1:3]] == ["dgl", "backprop"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function get_sweep"),
        ("import nothing_there\n", "No module named 'nothing_there'"),
        ("def get_sweep():\n    yield 1 / 0\n", r"ZeroDivisionError: .*file\.py:2"),
        ("def get_sweep():\n    return 3\n", "TypeError: 'int' object is not iterable"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        list(rows.load(sweep_file(tmp_path, text)))
    assert str(caught.value).startswith("--sweep")


def test_a_missing_file_is_reported_with_similar_names(tmp_path):
    with pytest.raises(UserError, match=r"--sweep=digit: neither a file nor a sweep .*digits"):
        rows.load("digit")
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        rows.load(str(tmp_path / "nowhere.py"))


# ---- division of the machine ----


def test_processors_are_divided_without_overlap(monkeypatch):
    monkeypatch.setattr(system, "usable_cpus", lambda: [0, 2, 3, 5, 7])
    assert shares("cpu", 1, None) == [Share()]
    assert [part.cores for part in shares("cpu", 1, 2)] == [(0, 2), (3, 5, 7)]
    assert [len(part.cores) for part in shares("cpu", 4, 5)] == [1] * 5
    monkeypatch.setattr(system, "usable_cpus", lambda: None)  # macOS
    monkeypatch.setattr(system, "machine_cpus", lambda: 4)
    assert shares("cpu", 1, 2) == [Share(), Share()]


def test_gpus_are_divided_into_equal_parts(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [part.devices for part in shares("gpu", 3, None)] == [("0",), ("1",), ("2",)]
    assert [part.devices for part in shares("gpu", 5, 2)] == [("0", "1"), ("2", "3")]
    assert shares("gpu", 1, None) == shares("gpu", 4, 1) == [Share()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    part = shares("gpu", 2, 2)[1]
    assert part.environment()["CUDA_VISIBLE_DEVICES"] == "GPU-5"
    assert shares("tpu", 4, None) == [Share()]


@pytest.mark.parametrize(
    ("platform", "devices", "asked", "message"),
    [
        ("cpu", 4, 3, "--jobs=3: there are 2 processors here"),
        ("gpu", 1, 2, "--jobs=2: there is one GPU, and a run takes most of its memory"),
        ("gpu", 4, 5, "--jobs=5: there are 4 GPUs"),
        ("tpu", 4, 2, "--jobs=2: on TPU devices only one process can run"),
        ("cpu", 4, 0, "--jobs=0: must be at least 1"),
    ],
)
def test_too_many_jobs_are_refused(platform, devices, asked, message, monkeypatch):
    monkeypatch.setattr(system, "usable_cpus", lambda: [0, 1])
    with pytest.raises(UserError, match=message):
        shares(platform, devices, asked)


def test_all_jobs_have_the_same_number_of_threads(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(system, "usable_cpus", lambda: list(range(40)))
    parts = shares("cpu", 1, 3)
    assert [part.environment()["NPROC"] for part in parts] == ["40"] * 3
    assert Share().environment()["NPROC"] == "40"
    monkeypatch.setenv("NPROC", "5")
    assert parts[0].environment()["NPROC"] == "5"


# ---- scheduling with fake processes ----


class FakeJob:
    """Process that ends after some looks at it, or when it is stopped.

    Args:
      code: its exit code.
      looks: number of looks until it ends.
      exit_on_stop: its exit code after a request to stop; None to ignore the request.
    """

    def __init__(self, code: int = 0, looks: int = 1, exit_on_stop: int | None = 143):
        self.code, self.looks, self.exit_on_stop = code, looks, exit_on_stop
        self.calls: list[str] = []

    def poll(self):
        self.looks -= 1
        return self.code if self.looks < 0 else None

    def stop(self):
        self.calls.append("stop")
        if self.exit_on_stop is not None:
            self.code, self.looks = self.exit_on_stop, 0

    def kill(self):
        self.calls.append("kill")

    def seconds(self):
        return 3.0

    def error(self):
        return "it broke"


def fake_rows(*names: str) -> list[Row]:
    settings = make_settings(small_config())
    return [Row(name, settings, Path("/nowhere", name), "command") for name in names]


def run_loop(table, fakes, count=1, interruption=None, pause=lambda: None, **options):
    """Runs the scheduler; returns the launches as (name, job) and the states after each change."""
    launched, states = [], []

    def launch(row, slot):
        launched.append((row.name, slot))
        return fakes[row.name]

    def save():
        states.append(tuple(row.state for row in table))

    loop = Loop(
        table,
        count,
        launch,
        Costs(),
        interruption or Interruption(),
        save,
        bars=Bars(Console(file=io.StringIO())),
        pause=pause,
        **{"locked": lambda _: False} | options,
    )
    loop.run()
    return launched, states


def test_a_free_job_takes_the_next_row():
    table = fake_rows("a", "b", "c", "d")
    table[1].state = "finished"
    fakes = {"a": FakeJob(looks=4), "c": FakeJob(looks=1), "d": FakeJob(looks=1)}
    launched, states = run_loop(table, fakes, count=2)
    assert launched == [("a", 0), ("c", 1), ("d", 1)]
    assert states[0] == ("waiting", "finished", "waiting", "waiting")
    assert ("running", "finished", "finished", "running") in states
    assert states[-1] == ("finished",) * 4
    assert max(state.count("running") for state in states) == 2


def test_a_failed_row_does_not_stop_the_others():
    table = fake_rows("a", "b")
    run_loop(table, {"a": FakeJob(code=2), "b": FakeJob()})
    assert [(row.state, row.error, row.exit_code) for row in table] == [
        ("failed", "it broke", 2),
        ("finished", None, 0),
    ]
    assert Result(tuple(table)).exit_code == 1
    assert Result(tuple(table[1:])).exit_code == 0


def test_a_signal_stops_the_running_rows_and_starts_no_other():
    table, interruption = fake_rows("a", "b", "c", "d"), Interruption()
    fakes = {
        "a": FakeJob(looks=99),
        "b": FakeJob(looks=3, exit_on_stop=None),  # reaches its end while it is asked to stop
        "c": FakeJob(looks=99, exit_on_stop=2),
    }
    looks = []

    def pause():
        looks.append(0)
        if len(looks) == 1:
            interruption(signal.SIGINT, None)

    launched, _ = run_loop(table, fakes, 3, interruption, pause)
    assert [name for name, _ in launched] == ["a", "b", "c"]
    assert [row.state for row in table] == ["stopped", "finished", "failed", "waiting"]
    assert all(fakes[name].calls == ["stop"] for name in "abc")  # never twice
    assert Result(tuple(table), signal.SIGINT).exit_code == 130


def test_a_second_signal_kills_the_running_rows():
    table, interruption = fake_rows("a", "b"), Interruption()
    fakes = {"a": FakeJob(looks=99, exit_on_stop=None)}

    def pause():
        interruption(signal.SIGTERM, None)

    _, states = run_loop(table, fakes, 1, interruption, pause)
    assert fakes["a"].calls[:2] == ["stop", "kill"]
    assert states[-1] == ("stopped", "waiting")
    assert Result(tuple(table), signal.SIGTERM).exit_code == 143


def test_a_row_that_another_process_trains_waits(tmp_path):
    table = fake_rows("a", "b")
    answers = {"a": [True, True, True], "b": []}
    fakes = {"a": FakeJob(), "b": FakeJob()}

    def locked(folder):
        return bool(answers[folder.name] and answers[folder.name].pop())

    launched, _ = run_loop(table, fakes, locked=locked)
    assert [name for name, _ in launched] == ["b", "a"]
    with lock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "nowhere")


# ---- estimates ----


def test_kinds_differ_in_what_costs_time():
    def kind(**fields):
        return kind_of(make_settings(small_config(**fields)))

    same = {"seed": 3, "optimizer__learning_rate": 0.5, "train__steps": 90, "log__every": 7}
    for name, value in same.items():
        assert kind(**{name: value}) == kind(), name
    other = {"model__width": 8, "method__name": "backprop", "data__batch_size": 4}
    for name, value in other.items():
        assert kind(**{name: value}) != kind(), name


def test_the_time_is_that_of_the_steps_left(tmp_path):
    def row(name, **fields):
        return Row(name, make_settings(small_config(**fields)), tmp_path / name, "")

    costs = Costs()
    small, wide = row("small"), row("wide", model__width=8, train__steps=0, train__epochs=3.0)
    assert costs.seconds([small], 1) is None
    assert costs.unknown([small, row("same", seed=1), wide]) == [small, wide]
    costs._known[kind_of(small.settings)] = Cost(0.5, 2.0, 6.0, 1000)
    assert costs.unknown([small, wide]) == [wide]
    assert costs.seconds([small], 1) == 2 + 12 * 0.5
    assert costs.seconds([small, wide], 1) == 2 * 8  # as long as the mean of the known rows
    costs._known[kind_of(wide.settings)] = Cost(1.0, 0.0, 6.0, 5000)
    assert costs.seconds([small, wide], 1) == 8 + 3 * 6
    assert costs.seconds([small, wide], 2) == 18  # at least the longest row
    assert costs.seconds([small] * 4 + [wide], 2) == (4 * 8 + 18) / 2
    assert costs.disk([small, wide]) == 3 * 6000  # two newest checkpoints and the best one
    write_metrics(small.folder, 4)
    assert costs.seconds([small], 1) == 2 + 8 * 0.5
    costs.observe(small, 0.25, 6.0)
    assert costs.seconds([small], 1) == 2 + 8 * 0.25


def test_a_signal_ends_the_measurement():
    interruption, fake, started = Interruption(), FakeJob(looks=99), []

    def start(arguments, log):
        started.append(arguments)
        interruption(signal.SIGINT, None)
        return fake

    def pause():
        fake.looks = 0  # the process ends once it is killed
        fake.code = -9

    wide = Row("wide", make_settings(small_config(model__width=8)), Path("/nowhere/wide"), "")
    measure([*fake_rows("a", "b"), wide], Costs(), interruption, start, pause=pause)
    assert len(started) == 1
    assert started[0][0] == "--mode=bench"
    assert fake.calls[0] == "kill"


def test_a_finished_row_tells_the_cost_of_others(tmp_path):
    store(tmp_path / "a", small_config(), steps=12)
    table = make_rows([("a", small_config()), ("b", small_config(seed=1))], tmp_path)
    costs = Costs()
    costs.learn(table[0])
    assert costs.of(table[1]) == Cost(step=2.0, start=0.0, steps_per_epoch=6.0, checkpoint=1000)


def write_metrics(folder: Path, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            record = {"step": step, "epoch": step / 6, "time": 1000.0 + step}
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 99, "epo')  # a line that is being written


def test_progress_is_read_from_the_metrics(tmp_path):
    row = Row("a", make_settings(small_config(train__steps=0, train__epochs=5.0)), tmp_path, "")
    meter = Meter(row)
    meter.read(0.0)
    assert (meter.step, meter.total, meter.seconds()) == (0, None, None)
    assert newest_record(tmp_path) is None
    write_metrics(tmp_path, 3)
    meter.read(since=2000.0)
    assert meter.total is None  # the record of an earlier process
    meter.read(since=1000.0)
    assert (meter.step, meter.total, meter.rate) == (3, 30, None)
    write_metrics(tmp_path, 3, 6, 9)
    meter.read(since=1000.0)
    assert (meter.step, meter.rate, meter.seconds()) == (9, 1.0, 21.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.4, "3 s"),
        (59.6, "1 min 0 s"),
        (245, "4 min 5 s"),
        (1830, "30 min"),
        (3569, "59 min"),
        (3599, "1 h 0 min"),
        (11400, "3 h 10 min"),
    ],
)
def test_durations_are_written_for_people(seconds, text):
    assert spoken(seconds) == text


def test_every_running_row_has_a_bar(tmp_path):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    row, other = fake_rows("dgl/seed=0", "dgl/seed=1")
    with Bars(console) as bars:
        bars.show([Meter(row, 30, 120, 2.0), Meter(other)], "1 of 3 runs finished")
        bars._live.refresh()
    text = output.getvalue()
    assert "30/120 2 steps/s 45 s left" in text
    assert "starting" in text
    assert "1 of 3 runs finished" in text
    plain = io.StringIO()
    with Bars(Console(file=plain)) as bars:
        bars.show([Meter(row, 30, 120, 2.0)], "line")
    assert plain.getvalue() == ""


# ---- processes ----


def test_a_child_stops_when_its_parent_ends():
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        reading, writing = os.pipe()
        thread = threading.Thread(target=child.follow, args=(reading,), daemon=True)
        thread.start()
        os.write(writing, b"x")  # only the end counts
        assert not received.is_set()
        os.close(writing)
        thread.join(60)
        assert received.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reading)


def test_a_child_that_has_received_a_signal_gets_no_second_one():
    interruption = Interruption()
    before = signal.signal(signal.SIGTERM, interruption)
    try:
        interruption(signal.SIGTERM, None)
        reading, writing = os.pipe()
        os.close(writing)
        child.follow(reading)  # a second signal would raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reading)


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", "--mode=sweep", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    folder, shipped = f"--workdir={tmp_path / 'new'}", "--sweep=digits:tiny"
    for arguments, message in [
        ([folder], "--sweep is missing"),
        ([folder, "--sweep=digit"], "--sweep=digit: neither a file nor a sweep"),
        ([folder, "--sweep=digits:huge"], "ValueError: no size 'huge'"),
        ([folder, shipped, "--jobs=0"], "--jobs=0"),
        ([folder, shipped, "--jobs=9999"], "--jobs=9999: there are"),
        ([folder, shipped, "--config=digits"], "--config: does not apply to --mode=sweep"),
        ([folder, shipped, "--config.data.batch_size=1"], "config.data.batch_size=1"),
        ([folder, shipped, "--config.data.batchsize=8"], "batchsize"),
        ([shipped], "--workdir is missing"),
    ]:
        done = launch(*arguments)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_platform_that_jax_cannot_open_is_reported(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=nonsense: JAX cannot open it here"):
        jobs.backend()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert jobs.backend() == ("cpu", 1)


# Holds a run at steps 6 and 9 until a signal arrives, as long as the file HOLD is there.
HOLD = """
import os, signal, time
from dgl_jax.run.record import Record
original = Record.write_training

def write_training(self, step, state):
    original(self, step, state)
    while step in (6, 9) and os.path.exists(os.environ["HOLD"]):
        if signal.getsignal(signal.SIGTERM).signum is not None:
            break
        time.sleep(0.01)

Record.write_training = write_training
"""
SWEEP = """
from dgl_jax.config import default_config

def get_sweep(argument=None):
    for name, rate in (("a/seed=0", 0.05), ("bad", 1e20), ("c", 0.02)):
        config = default_config(("hold",))
        for field, value in {fields!r}.items():
            group, _, leaf = field.rpartition(".")
            setattr(config[group], leaf, value)
        config.optimizer.learning_rate = rate
        config.train.steps = 24
        if argument != "good" or name != "bad":
            yield name, config
"""


@pytest.fixture
def held(tmp_path, monkeypatch) -> Path:
    """Returns a sweep file whose runs are held at steps 6 and 9 while the file `hold` exists."""
    (tmp_path / "hold.py").write_text(HOLD)
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.delenv("NPROC")
    monkeypatch.setitem(sys.modules, "hold", ModuleType("hold"))  # this process holds nothing
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP.format(fields=FIELDS))
    return path


def states(workdir: Path) -> dict[str, str]:
    table = json.loads((workdir / "sweep.json").read_text())["rows"]
    return {name: row["state"] for name, row in table.items()}


def interrupt(path: Path, workdir: Path, step: int, signum: int) -> int:
    """Starts a sweep and sends it a signal when both rows have reached a step."""
    arguments = [f"--sweep={path}:good", f"--workdir={workdir}", "--jobs=2", "--noestimate"]
    command = [sys.executable, "launch.py", "--mode=sweep", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        folders = [workdir / "a" / "seed=0", workdir / "c"]
        while any((newest_record(folder) or {"step": 0})["step"] < step for folder in folders):
            assert process.poll() is None
            time.sleep(0.02)
        assert is_locked(folders[0])
        process.send_signal(signum)
        return process.wait(300)


@pytest.mark.slow
@pytest.mark.skipif((system.cpu_count() or 1) < 2, reason="needs two processors")
def test_stopped_and_killed_sweeps_equal_an_undisturbed_one(held, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    (tmp_path / "hold").touch()
    assert interrupt(held, parts, 6, signal.SIGINT) == 130
    assert states(parts) == {"a/seed=0": "stopped", "c": "stopped"}
    assert (parts / "c" / "checkpoints" / "6").exists()
    # The runs notice that the sweep was killed, and save before they end.
    assert interrupt(held, parts, 9, signal.SIGKILL) == -signal.SIGKILL
    while any(is_locked(parts / name) for name in ("a/seed=0", "c")):
        time.sleep(0.02)
    for name in ("a/seed=0", "c"):
        assert "SIGTERM: stopped at step" in (parts / name / "log.txt").read_text()
    (tmp_path / "hold").unlink()
    done = launch(f"--sweep={held}:good", f"--workdir={parts}", "--jobs=2", "--noestimate")
    assert done.returncode == 0, done.stderr
    assert states(parts) == {"a/seed=0": "finished", "c": "finished"}
    assert "2 to resume, 0 to start; 2 at the same time" in done.stderr
    for name in ("a/seed=0", "c"):
        log = (parts / name / "log.txt").read_text()
        starts = [int(step) for step in re.findall(r"resuming from step (\d+)", log)]
        assert len(starts) == 2
        assert 6 <= starts[0] < 9 <= starts[1] < 24

    # One job at a time, with a row that diverges.
    done = launch(f"--sweep={held}", f"--workdir={whole}")
    assert done.returncode == 1, done.stderr
    assert states(whole) == {"a/seed=0": "finished", "bad": "failed", "c": "finished"}
    table = json.loads((whole / "sweep.json").read_text())
    assert table["sweep"] == str(held)
    assert table["rows"]["bad"]["exit_code"] == 2
    assert "training diverged" in table["rows"]["bad"]["error"]
    assert f"bad failed: {table['rows']['bad']['error']}" in done.stderr
    assert "estimated time: about" in done.stderr
    assert json.loads(done.stdout)["failed"] == ["bad"]
    for name in ("a/seed=0", "c"):
        assert same_run(parts / name, whole / name)
        threads = [
            json.loads((folder / name / "summary.json").read_text())["cpu_threads"]
            for folder in (parts, whole)
        ]
        assert threads == [system.pool_threads()] * 2
    assert not same_run(whole / "a/seed=0", whole / "c")
