"""Base class of the synchronous engines, and the loops that dispatch their ticks."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import EngineState, Report, Snapshot, counts, place_modules
from dgl_jax.engines.collect import collector
from dgl_jax.engines.feed import Feed, Residence
from dgl_jax.engines.pace import Pace
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.program import Programs
from dgl_jax.engines.transfer import distribute
from dgl_jax.methods.post import Post
from dgl_jax.schedule import Group
from dgl_jax.spec import Traffic, TrainSpec
from dgl_jax.types import Message


class Synchronous:
    """Base class of synchronous engines, whose state between two calls of `run` is in the modules.

    Attributes:
      residence: keeps the data set on the devices of the first module, if it fits.
      early: metrics of batches that some modules have worked on and others have not yet, by batch
        and module. Only methods with delayed updates have such batches between two calls of `run`.
      host_seconds: seconds that the host has spent starting work on the devices.
    """

    spec: TrainSpec
    placement: Placement
    continuous = False
    recover: Callable[[int], ModuleState | None] | None = None
    residence = Residence("off")
    host_seconds = 0.0
    early: Mapping[int, Mapping[int, Metrics]] = MappingProxyType({})

    def feed(self, source: Source) -> Feed:
        """Returns the supply of batches for the first module."""
        return Feed(source, self.placement, self.residence)

    def traffic(self) -> Traffic:
        """Returns the sizes of the encoded arrays, as if they crossed devices."""
        return self.spec.traffic()

    def init(self) -> EngineState:
        """Returns a fresh state with each module on its devices."""
        return self.place(EngineState(self.spec.init()))

    def place(self, state: EngineState) -> EngineState:
        """Moves a state to the engine's devices."""
        return place_modules(state.modules, self.placement, distribute)

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """Moves a restored state and its waiting messages to the devices; ignores `saved`."""
        return self.place(state)

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Returns an empty dict: synchronous engines measure nothing."""
        return {}


def run_ticks(
    engine: Any,
    groups: Iterable[Group],
    dispatch: Callable[[Group], Sequence[Metrics]],
    counts: Sequence[int],
    snapshot: Snapshot,
    pace: Pace,
) -> Iterator[Report]:
    """Dispatches ticks ahead of the devices and reports each finished batch.

    A report is yielded once all modules have made their update on its batch (or for each update, if
    the method defines `progress`) and the metrics are computed, so reading them never stalls the
    devices. Only the last report can return a snapshot.

    Args:
      engine: object with `spec`, `ticks_in_flight`, the number of unfinished ticks allowed when the
        next one is dispatched, `host_seconds`, to which the time of the dispatches is added, and
        `early`. Of groups of several ticks one may be unfinished.
      groups: ticks of the method's schedule, as groups of one or more ticks with equal turns.
      dispatch: starts the turns of a group and returns the metrics of each turn of a tick, with a
        leading axis over the ticks if the group has more than one.
      counts: updates that each module has made before the run. A batch below a module's count does
        not wait for that module, and reports its metrics if they are in `engine.early`.
      snapshot: returns the final state; see `Report`.
      pace: keeps the processes of the run in step.
    """
    waiting: deque[tuple[Group, Sequence[Metrics]]] = deque()
    pending: Report | None = None
    compiled: list[bool] = []  # per dispatch since the newest group with reports
    previous = time.monotonic()
    collect = collector(engine, counts, _snapshot_in_flight)

    def reports_of(group: Group, metrics: Sequence[Metrics]) -> Iterator[Report]:
        nonlocal previous
        jax.block_until_ready(metrics)
        pace.finished()
        begun, previous = previous, time.monotonic()
        if len(group) > 1:
            metrics = jax.device_get(metrics)  # slicing on the devices would be a program each
        reported = False
        for i, tick in enumerate(group):
            parts = jax.tree.map(lambda x, i=i: x[i], metrics) if len(group) > 1 else metrics
            for report in collect(tick, parts):
                # The ticks of a dispatch end together, and each one took an equal part of its time.
                report.at = previous - (len(group) - 1 - i) / len(group) * (previous - begun)
                report.compiled = any(compiled)
                reported = True
                yield report
        if reported:
            compiled.clear()

    def reports() -> Iterator[Report]:
        for number, group in enumerate(groups):
            pace.wait(number)
            begin, built = time.perf_counter(), Programs.built
            # Guard the dispatch alone: a generator that yields inside `with` would leave the guard
            # on in its caller.
            with jax.transfer_guard("disallow"):
                waiting.append((group, dispatch(group)))
            engine.host_seconds += time.perf_counter() - begin
            compiled.append(Programs.built > built)  # a program compiles when it is first called
            while len(waiting) > (engine.ticks_in_flight if len(group) == 1 else 1):
                yield from reports_of(*waiting.popleft())
        while waiting:
            yield from reports_of(*waiting.popleft())
        pace.close()

    for report in reports():
        if pending is not None:
            yield pending
        pending = report
    if pending is not None:
        pending.snapshot = snapshot
        yield pending


def run_turns(
    engine: Any,
    state: EngineState,
    source: Source,
    until: int,
    stop: Callable[[], bool],
    move: Callable[..., tuple[Message, Any]] | None = None,
    overlap: bool = False,
) -> Iterator[Report]:
    """Runs the method's schedule with one program per turn; see `Engine.run`.

    Args:
      engine: synchronous engine with `total_steps`, `ticks_in_flight` and `programs` (by module and
        kind).
      state: state to start from; its arrays are donated.
      source: random-access source of batches.
      until: step at which to stop.
      stop: polled between ticks; no new batch enters after it returns true.
      move: moves messages to the devices of their reader, see `methods.base.Post`; None if nothing
        has to move.
      overlap: true if modules work at the same time on devices of their own.
    """
    post, feed = Post(engine.spec, state.modules, move), engine.feed(source)
    updates_before = counts(state)
    pace = Pace(engine.placement, engine.ticks_in_flight, stop)

    ticks = engine.spec.method.schedule(
        updates_before, until, max(until, engine.total_steps), pace.stop, overlap
    )
    yield from run_ticks(
        engine,
        ((tick,) for tick in ticks),
        lambda group: post.run(group[0], engine.programs, feed.batch),
        updates_before,
        lambda flight=True: EngineState(post.closed()),
        pace,
    )


def _snapshot_in_flight(flight: bool = True) -> EngineState:
    raise RuntimeError("batches are in flight: only the last report of a run returns a snapshot")
