"""Images per second and updates per second, by hand: no time that compiling, evaluating or saving took is in them."""

import dataclasses
import threading
from collections.abc import Callable

import jax
import pytest

from dgl_jax.config import ReplaySettings, options
from dgl_jax.engines import SimulatedEngine, SimulatedOptions, ThreadsEngine, ThreadsOptions
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.run.throughput import Throughput

TOTAL, BATCH = 8, 8


class Clock:
    """Stands still, but for a second a call of a module's program and 1000 s for what JAX compiles."""

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
        """Every call takes a second from now on; `before` it of module k."""
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
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    yield clock
    jax.monitoring.unregister_event_duration_listener(clock.compiled)


def trained(tiny, made, clock):
    """Counts as a training run does, by the clock of the programs; what was counted, and the rates of the modules at the end."""
    throughput, step = Throughput(BATCH, clock), 0
    state = made.resume(tiny.place(made, tiny.init(made.spec)), None)
    jax.block_until_ready(state.modules)
    throughput.start()
    for report in made.run(state, tiny.source, TOTAL):
        throughput.count(report.step - step, report.at)
        step = report.step
        report.snapshot()
    assert clock.now > 1000.0, "something was compiled"
    return throughput, {
        name: value
        for name, value in made.gauges(report.snapshot()).items()
        if "updates_per" in name
    }


@pytest.mark.parametrize("order", ["ordered", "random"])
def test_simulated_by_hand(tiny, devices, clock, order):
    made = SimulatedEngine(
        tiny.spec(),
        one_group(devices[:1], 3),
        TOTAL,
        SimulatedOptions(order=order),
        ReplaySettings(3),
    )
    clock.timed(made.programs)
    clock.timed(made.feeds)
    found, _ = trained(tiny, made, clock)
    if order == "ordered":
        assert clock.calls == 3 * TOTAL
    else:
        assert clock.calls > 3 * TOTAL, "a module that is done feeds the next one"
    assert clock.compiled_late == 0
    # The first turn is over when the clock of the throughput begins; every other one took a second.
    assert (found.images, found.seconds) == (TOTAL * BATCH, clock.calls - 1)
    assert found.rate() == round(TOTAL * BATCH / (clock.calls - 1), 2)


VQ = options("codec", name="vq", dims=2, codes=4, codebook_every=2, start="sample", restart=0.0)
CASES = {
    "a device each": ((1, 1, 1), "identity"),
    "two devices, sent codebooks": ((2, 1, 1), VQ),
    "newest codebooks": ((1, 1, 1), dataclasses.replace(VQ, decode="latest")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_threads_compile_nothing_once_they_work(tiny, devices, clock, case):
    groups, codec = CASES[case]
    made = ThreadsEngine(
        tiny.spec(codec=codec), assign(devices, 3, groups), ThreadsOptions(), ReplaySettings(3)
    )
    made.clock, made.watchdog_seconds = clock, 0.0
    fed, last = threading.Event(), iter(range(1, TOTAL + 1))
    # The last update waits for a module that is done and only feeds.
    clock.timed(made.programs, lambda k: k == 2 and next(last) == TOTAL and fed.wait(120))
    clock.timed(made.feeds, lambda k: fed.set())
    found, rates = trained(tiny, made, clock)
    assert fed.is_set()
    assert clock.compiled_late == 0
    assert found.images == TOTAL * BATCH
    assert 0 < found.seconds <= clock.calls - 1
    assert len(rates) == 3
    assert all(rate >= TOTAL / clock.calls for rate in rates.values())


def test_what_is_done_while_an_evaluation_lasts_is_not_counted():
    now = [100.0]
    found = Throughput(10, lambda: now[0])
    found.start()
    for at, batches in (
        (150.0, 1),
        (151.0, 1),
        (152.0, 0),
        (153.0, 1),
    ):  # the first report ends the start
        found.count(batches, at)
    assert (found.images, found.seconds, found.rate()) == (20, 3.0, 6.67)
    now[0] = 160.0  # an evaluation is over; the workers went on meanwhile
    found.start()
    for at, batches in ((155.0, 1), (159.0, 1), (161.0, 1), (160.5, 0), (163.0, 1)):
        found.count(batches, at)
    assert (found.images, found.seconds, found.rate()) == (40, 6.0, 6.67)


def test_without_stamps_reports_are_counted_when_they_are_read():
    now = [0.0]
    found = Throughput(10, lambda: now[0])
    found.start()
    for now[0] in (50.0, 52.0, 54.0):
        found.count(1)
    assert found.rate() == 5.0
    now[0] = 70.0
    found.start()
    now[0] = 72.0
    found.count(1)
    assert (found.images, found.seconds) == (30, 6.0)
