"""Images/s and updates/s exclude the time of compilation, evaluation and checkpoints."""

import dataclasses
import threading
from collections.abc import Callable

import jax
import pytest
from runs import LEAN_VQ, small_config

from dgl_jax.config import ReplaySettings, make_settings, options
from dgl_jax.core.program_cache import clear_programs
from dgl_jax.engines import Report, SimulatedEngine, SimulatedOptions, ThreadsEngine, ThreadsOptions
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.run.build import make_experiment
from dgl_jax.run.metrics import Window
from dgl_jax.run.record import Record
from dgl_jax.run.throughput import Throughput

TOTAL, BATCH = 8, 8


@pytest.mark.parametrize("broken", [False, True], ids=["", "twin"])
def test_time_of_compiling_during_a_run_is_left_out(broken):
    record = Record.__new__(Record)
    record.throughput = Throughput(10, lambda: 0.0)
    record._report, record._window = None, Window()
    record.throughput.start()
    if broken:
        record.throughput.skip = lambda at: record.throughput.count(0, at)
    # (time, module, advance in steps): two modules with four updates each, a second per update and
    # a minute to compile the second program.
    for at, module, advance in (
        (100, 0, 0), (101, 0, 1), (102, 0, 0), (103, 0, 1),
        (163, 1, 0), (164, 1, 1), (165, 1, 0), (166, 1, 1),
    ):  # fmt: skip
        report = Report((0, 0), ({}, {}), lambda: None, step=0, module=module, at=at)
        report.compiled = at in (100, 163)
        record.add(report, advance)
    assert record.throughput.rate() == pytest.approx(40 / (66 if broken else 6), abs=0.01)


@pytest.mark.medium
def test_reports_tell_when_a_program_was_compiled():
    """Checks a `layerwise` run, in which the program of a module compiles when it begins."""
    fields = {"method__name": "layerwise", "model__modules": 2, "train__steps": 8}
    experiment = make_experiment(make_settings(small_config(**fields)), jax.devices()[:1])
    engine = experiment.engine
    compiled = [r.compiled for r in engine.run(engine.init(), experiment.source, 8)]
    assert len(compiled) == 16
    assert compiled[0]
    (second,) = [number for number, flag in enumerate(compiled) if flag and number]
    # Ticks are dispatched a little before the reports of earlier ones.
    assert 8 - engine.ticks_in_flight - 1 <= second <= 8


class Clock:
    """Fake clock that advances 1 s per call of a program and 1000 s per JAX compilation."""

    def __init__(self) -> None:
        self.now, self.calls, self.compiled_late = 0.0, 0, 0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def compiled(self, event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self.now += 1000.0
                self.compiled_late += bool(self.calls)

    def timed(self, programs: list, before: Callable[[int], None] = lambda k: None) -> None:
        """Makes programs advance the clock after each call; `before(k)` runs before module k's."""
        for k, program in enumerate(programs):

            def call(*args, k=k, program=program):
                before(k)
                result = program(*args)
                with self._lock:
                    self.now += 1.0
                    self.calls += 1
                return result

            programs[k] = call


@pytest.fixture
def clock():
    clock = Clock()
    clear_programs()  # tests of another file may have built equal engines in this process
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    yield clock
    jax.monitoring.unregister_event_duration_listener(clock.compiled)


def trained(tiny, engine, clock):
    """Trains with a throughput meter as `train_loop` does.

    Returns the meter, and the final updates/s of the modules.
    """
    throughput, step = Throughput(BATCH, clock), 0
    state = engine.resume(tiny.place(engine, tiny.init(engine.spec)), None)
    jax.block_until_ready(state.modules)
    throughput.start()
    for report in engine.run(state, tiny.source, TOTAL):
        throughput.count(report.step - step, report.at)
        step = report.step
        report.snapshot()
    assert clock.now > 1000.0, "something was compiled"
    return throughput, {
        name: value
        for name, value in engine.gauges(report.snapshot()).items()
        if "updates_per" in name
    }


@pytest.mark.parametrize("order", ["ordered", "random"])
def test_simulated_engine_counts_every_turn(tiny, devices, clock, order):
    engine = SimulatedEngine(
        tiny.spec(),
        one_group(devices[:1], 3),
        TOTAL,
        SimulatedOptions(order=order),
        ReplaySettings(3),
    )
    clock.timed(engine.programs)
    clock.timed(engine.feeds)
    meter, _ = trained(tiny, engine, clock)
    if order == "ordered":
        assert clock.calls == 3 * TOTAL
    else:
        assert clock.calls > 3 * TOTAL, "a finished module still feeds the next one"
    assert clock.compiled_late == 0
    # The meter starts after the first turn; every other turn took one second.
    assert (meter.images, meter.seconds) == (TOTAL * BATCH, clock.calls - 1)
    assert meter.rate() == round(TOTAL * BATCH / (clock.calls - 1), 2)


VQ = options("codec", name="vq", dims=2, codes=4, codebook_every=2, **LEAN_VQ)
CASES = {
    "one device per module": ((1, 1, 1), "identity"),
    "two devices, codebooks sent": ((2, 1, 1), VQ),
    "newest codebooks used": ((1, 1, 1), dataclasses.replace(VQ, decode="latest")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_threads_engine_compiles_nothing_after_the_start(tiny, devices, clock, case):
    groups, codec = CASES[case]
    engine = ThreadsEngine(
        tiny.spec(codec=codec), assign(devices, 3, groups), ThreadsOptions(), ReplaySettings(3)
    )
    engine.clock, engine.watchdog_seconds = clock, 0.0
    fed, last = threading.Event(), iter(range(1, TOTAL + 1))
    # The last update of module 2 waits until a finished module has fed it.
    clock.timed(engine.programs, lambda k: k == 2 and next(last) == TOTAL and fed.wait(120))
    clock.timed(engine.feeds, lambda k: fed.set())
    meter, rates = trained(tiny, engine, clock)
    assert fed.is_set()
    assert clock.compiled_late == 0
    assert meter.images == TOTAL * BATCH
    assert 0 < meter.seconds <= clock.calls - 1
    assert len(rates) == 3
    assert all(rate >= TOTAL / clock.calls for rate in rates.values())


def test_batches_finished_during_an_evaluation_are_not_counted():
    now = [100.0]
    meter = Throughput(10, lambda: now[0])
    meter.start()
    # The first report ends the compilation and is not counted.
    for at, batches in ((150.0, 1), (151.0, 1), (152.0, 0), (153.0, 1)):
        meter.count(batches, at)
    assert (meter.images, meter.seconds, meter.rate()) == (20, 3.0, 6.67)
    now[0] = 160.0  # an evaluation is over, during which the workers trained
    meter.start()
    for at, batches in ((155.0, 1), (159.0, 1), (161.0, 1), (160.5, 0), (163.0, 1)):
        meter.count(batches, at)
    assert (meter.images, meter.seconds, meter.rate()) == (40, 6.0, 6.67)


def test_reports_without_time_stamps_use_the_time_of_reading():
    now = [0.0]
    meter = Throughput(10, lambda: now[0])
    meter.start()
    for now[0] in (50.0, 52.0, 54.0):
        meter.count(1)
    assert meter.rate() == 5.0
    now[0] = 70.0
    meter.start()
    now[0] = 72.0
    meter.count(1)
    assert (meter.images, meter.seconds) == (30, 6.0)
