"""Jobs of a sweep: division of the machine, scheduling with fake processes, estimates and bars."""

import io
import json
import signal
from pathlib import Path

import pytest
from rich.console import Console
from runs import small_config
from written_runs import store_run

from dgl_jax import system
from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.run.signals import Interruption
from dgl_jax.run.workdir import is_locked, lock
from dgl_jax.tools.bars import Bars
from dgl_jax.tools.estimate import Cost, Costs, Meter, kind_of, newest_record, spoken
from dgl_jax.tools.jobs import Share, shares
from dgl_jax.tools.rows import Row, make_rows
from dgl_jax.tools.sweep import Loop, Result, measure


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


def test_kinds_differ_in_what_costs_time():
    def kind(**fields):
        return kind_of(make_settings(small_config(**fields)))

    same = {"seed": 3, "optimizer__learning_rate": 0.5, "train__steps": 90, "log__every": 7}
    for name, value in same.items():
        assert kind(**{name: value}) == kind(), name
    other = {"checkpoint__replay_every": 0, "engine__name": "simulated"}
    assert kind(**other) != kind(engine__name="simulated")
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
    unknown = row("unknown", model__width=16)
    assert costs.disk([small, unknown, wide]) == 3 * 9000  # as large as the mean of the known rows
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
    store_run(tmp_path / "a", small_config(), steps=12)
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
