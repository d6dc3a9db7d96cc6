"""Base class of the synchronous engines, and the loops that dispatch their ticks."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import EngineState, Report, Snapshot, counts, place_modules
from dgl_jax.engines.placement import Placement, put
from dgl_jax.methods.base import Post
from dgl_jax.schedule import Tick, Turn
from dgl_jax.spec import Traffic, TrainSpec
from dgl_jax.types import Batch, Message


class Synchronous:
    """Base class of synchronous engines: nothing is in flight between two calls of `run`."""

    spec: TrainSpec
    placement: Placement
    continuous = False
    recover: Callable[[int], ModuleState | None] | None = None

    def traffic(self) -> Traffic:
        """Returns the sizes of the encoded arrays, as if they crossed devices."""
        return self.spec.traffic()

    def init(self) -> EngineState:
        """Returns a fresh state with each module on its devices."""
        return self.place(EngineState(self.spec.init()))

    def place(self, state: EngineState) -> EngineState:
        """Moves a state to the engine's devices."""
        return place_modules(state.modules, self.placement, put)

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """Moves a restored state and its waiting messages to the devices; ignores `saved`."""
        return self.place(state)

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Returns an empty dict: synchronous engines measure nothing."""
        return {}


def run_ticks(
    ticks: Iterator[Tick],
    dispatch: Callable[[Tick], list[tuple[Turn, Metrics]]],
    in_flight: int,
    counts: Sequence[int],
    snapshot: Snapshot,
) -> Iterator[Report]:
    """Dispatches ticks up to `in_flight` ahead of the devices and reports each finished batch.

    A report is yielded once all modules have made their update on its batch and the metrics are
    computed, so reading them never stalls the devices. Only the last report can return a snapshot.

    Args:
      ticks: ticks of the method's schedule.
      dispatch: starts the turns of a tick and returns their metrics.
      in_flight: number of unfinished ticks allowed when the next one is dispatched.
      counts: updates that each module has made before the run. A batch below a module's count does
        not wait for that module and reports no metrics of it.
      snapshot: returns the final state; see `Report`.
    """
    waiting: deque[list[tuple[Turn, Metrics]]] = deque()
    collected: dict[int, dict[int, Metrics]] = {}
    pending: Report | None = None
    furthest = max(counts)

    def expected_metrics(batch: int) -> int:
        return len(counts) if batch >= furthest else sum(count <= batch for count in counts)

    def reports_of(results: list[tuple[Turn, Metrics]]) -> Iterator[Report]:
        jax.block_until_ready([metrics for _, metrics in results])
        for turn, metrics in results:
            if turn.updates():
                collected.setdefault(turn.batch, {})[turn.module] = metrics
        for batch in sorted(
            b for b, batch_metrics in collected.items() if len(batch_metrics) == expected_metrics(b)
        ):
            batch_metrics = collected.pop(batch)
            report_metrics = tuple(batch_metrics.get(k, {}) for k in range(len(counts)))
            yield Report(
                (batch + 1,) * len(counts), report_metrics, _snapshot_in_flight, step=batch + 1
            )

    def reports() -> Iterator[Report]:
        for tick in ticks:
            # Guard the dispatch alone: a generator that yields inside `with` would leave the guard
            # on in its caller.
            with jax.transfer_guard("disallow"):
                waiting.append(dispatch(tick))
            while len(waiting) > in_flight:
                yield from reports_of(waiting.popleft())
        while waiting:
            yield from reports_of(waiting.popleft())

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
      engine: object with `spec`, `placement`, `total_steps`, `ticks_in_flight` and `programs` (by
        module and kind).
      state: state to start from; its arrays are donated.
      source: random-access source of batches.
      until: number of updates per module at which to stop.
      stop: polled between ticks; no new batch enters after it returns true.
      move: moves messages to the devices of their reader, see `methods.base.Post`; None if nothing
        has to move.
      overlap: true if modules work at the same time on devices of their own.
    """
    post, read, updates_before = (
        Post(engine.spec, state.modules, move),
        reader(source),
        counts(state),
    )

    def batch(number: int) -> Batch:
        return engine.placement.put_batch(read(number), 0)

    def dispatch(tick: Tick) -> list[tuple[Turn, Metrics]]:
        results = []
        for turn in tick:
            k, number, kind = turn
            inbox, context = post.read(k, number, kind, batch)
            post.states[k], sent, metrics = engine.programs[k, kind](post.states[k], inbox, context)
            post.send(k, number, context, sent)
            results.append((turn, metrics))
        return results

    ticks = engine.spec.method.schedule(
        updates_before, until, max(until, engine.total_steps), stop, overlap
    )
    yield from run_ticks(
        ticks,
        dispatch,
        engine.ticks_in_flight,
        updates_before,
        lambda flight=True: EngineState(post.closed()),
    )


def reader(source: Source) -> Callable[[int], Batch]:
    """Returns a function that reads consecutive batches, starting at its first argument."""
    batches: Iterator[Batch] | None = None

    def read(number: int) -> Batch:
        nonlocal batches
        batches = source.batches(number) if batches is None else batches
        return next(batches)

    return read


def _snapshot_in_flight(flight: bool = True) -> EngineState:
    raise RuntimeError("batches are in flight: only the last report of a run returns a snapshot")
