"""What an engine is, and the loop that the synchronous ones share."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.placement import Placement, assign, check_batch, put
from dgl_jax.errors import UserError
from dgl_jax.fields import number, option
from dgl_jax.methods.base import Post, closed, opened
from dgl_jax.profile.flops import module_flops
from dgl_jax.registry import Kind
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import MessageSpec, Traffic, TrainSpec
from dgl_jax.types import Batch, Message


@dataclass(frozen=True)
class EngineInputs:
    """What every engine is made of.

    Attributes:
      devices: those to use.
      replay: of the rings of asynchronous engines.
      total_steps: updates every module will have at the end.
    """

    spec: TrainSpec
    devices: Sequence[jax.Device]
    replay: ReplaySettings
    total_steps: int

    def checked(self, placement: Placement) -> Placement:
        """Returns the placement; raises UserError if its device groups do not divide the batch."""
        check_batch(self.spec.batch_size, placement.sizes(), self.spec.accumulate)
        return placement

    def placed(self, group_sizes: Sequence[int]) -> Placement:
        """Returns a device group for each module; raises UserError if the sizes or the batch do not fit."""
        modules = len(self.spec.modules)
        costs = (
            [body + head for body, head in module_flops(self.spec)]
            if not group_sizes and len(self.devices) < modules
            else ()
        )
        return self.checked(assign(self.devices, modules, group_sizes, costs))


@dataclass(frozen=True)
class EngineKind(Kind):
    """An engine: `make(inputs, options)` returns an `Engine`; `inputs` are `EngineInputs`.

    Attributes:
      asynchronous: modules read packets from rings, which may be stale.
      continuous: see `Engine`.
      family: engines of one family give the same numbers and read each other's checkpoints; "": on its own.
    """

    asynchronous: bool = False
    continuous: bool = False
    family: str = ""


@dataclass(frozen=True)
class PlacedOptions(EngineSettings):
    """Of engines whose modules have devices of their own, or that use as many together."""

    group_sizes: tuple[int, ...] = option(
        (), free=True
    )  # devices of each module; empty: as equal as the devices allow

    def check(self, settings: Any) -> None:
        """Raises UserError if a module has no device."""
        if any(n < 1 for n in self.group_sizes):
            raise UserError(
                f"config.engine.group_sizes={self.group_sizes}: every module needs at least one device"
            )


@dataclass(frozen=True)
class SynchronousOptions(PlacedOptions):
    """Of engines in which all modules advance together."""

    ticks_in_flight: int = number(2, 1, 64, free=True)  # how far the host runs ahead of the devices


class Flight(Protocol):
    """What is under way between modules where that belongs to the algorithm: rings, turns. Lives on the host, changes in place.

    Attributes:
      unit: of the times in `recent`.
    """

    unit: str

    def snapshot(self) -> Any:
        """A pytree of host arrays, copied, for a checkpoint."""

    def recent(self) -> list[tuple[int, float, float]]:
        """The newest turns as (module, begin, end), oldest first."""


@dataclass(frozen=True)
class EngineState:
    """The states of all modules: one checkpoint form for every engine and device layout; `flight` is None in synchronous ones."""

    modules: tuple[ModuleState, ...]
    flight: Flight | None = None


class Snapshot(Protocol):
    """Gives the state of an engine."""

    def __call__(self, flight: bool = True) -> EngineState:
        """Returns the modules' states and, unless `flight` is false, what is under way: an evaluation has no use for that."""


@dataclass
class Report:
    """What a synchronous engine says after an update of its last module, an asynchronous one after an update of any.

    Attributes:
      updates: updates made by each module.
      metrics: of each module for its newest update, empty where this report brings none: device scalars, already computed.
      snapshot: gives the EngineState. Of a synchronous engine only the last report of a run has one: before it, batches are in
        the pipe.
      step: the step that the run has reached: the updates that every module has made. Falls back with a restarted module.
      at: seconds of a monotonic clock at which the update was done, if reports may be read later than they are made.
    """

    updates: tuple[int, ...]
    metrics: tuple[Metrics, ...]
    snapshot: Snapshot
    step: int = field(kw_only=True)
    at: float | None = None


class Engine(Protocol):
    """Decides which module works when, and where.

    Attributes:
      continuous: its modules go on while its reports are read, so that one `run` lasts until the end of training, whatever is done
        with snapshots in between.
      recover: gives a module's state from the newest checkpoint, and None if there is none: for engines that go on without a module
        that has failed.
    """

    spec: TrainSpec
    placement: Placement
    continuous: bool
    recover: Callable[[int], ModuleState | None] | None

    def traffic(self) -> Traffic:
        """What the packets weigh."""

    def init(self) -> EngineState:
        """Fresh state on its devices."""

    def place(self, state: EngineState) -> EngineState:
        """A state (restored, or another engine's) on this engine's devices."""

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """A restored state with its flight, from the snapshot in the checkpoint (None: it has none)."""

    def gauges(self, state: EngineState) -> dict[str, float]:
        """What the engine measures of itself, for the metrics."""

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; takes over (donates) `state`.

        Once `stop()` is true no new batch is begun; a synchronous run ends with all modules at the same count.
        """


class Synchronous:
    """What synchronous engines have in common: nothing is under way when they rest."""

    spec: TrainSpec
    placement: Placement
    continuous = False
    recover: Callable[[int], ModuleState | None] | None = None

    def traffic(self) -> Traffic:
        """Returns what the encoded arrays weigh, as if they crossed devices."""
        return self.spec.traffic()

    def init(self) -> EngineState:
        """Returns a fresh state, each module on its devices."""
        return self.place(EngineState(self.spec.init()))

    def place(self, state: EngineState) -> EngineState:
        """Returns a state on this engine's devices."""
        return place_modules(state.modules, self.placement, put)

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """Returns the state, with messages that wait where a turn reads them; there is nothing else."""
        return self.place(state)

    def gauges(self, state: EngineState) -> dict[str, float]:
        """None."""
        return {}


class Publisher:
    """Decides which packets of a hop bring their codebook along: the reader keeps it for the packets that follow.

    Args:
      hop: what crosses.
      known: the reader already has the newest codebook.
    """

    def __init__(self, hop: MessageSpec, known: bool = False):
        self._hop, self._known = hop, known

    def fresh(self, codebook: Any, updates: int | None) -> Any:
        """Returns what goes along with a packet: its codebook if the reader lacks it, else None.

        The reader counts as having the codebook from then on, so every packet must be asked about once, in order.

        Args:
          codebook: the one that the packet is encoded with.
          updates: the producer's count before the update that made the packet; None if it only feeds, which publishes nothing.
        """
        publishes = updates is not None and self._hop.publishes(updates)
        if not self._hop.period or (self._known and not publishes):
            return None
        self._known = True
        return codebook

    def forget(self) -> None:
        """Sends the codebook with the next packet: the producer was restarted, or a packet was lost."""
        self._known = False


def run_ticks(
    ticks: Iterator[Tick],
    dispatch: Callable[[Tick], list[tuple[Turn, Metrics]]],
    in_flight: int,
    counts: Sequence[int],
    snapshot: Snapshot,
) -> Iterator[Report]:
    """Dispatches ticks without waiting for their results, at most `in_flight` ahead, and reports each finished batch.

    A report comes once all modules have made their update on its batch and their metrics are computed, so reading them never stalls
    the devices. The last report alone can give a snapshot.

    Args:
      ticks: of the method's schedule.
      dispatch: starts the turns of a tick; returns their metrics.
      in_flight: ticks.
      counts: updates that the modules have made before; a report brings no metrics of those.
      snapshot: see `Report`.
    """
    waiting: deque[list[tuple[Turn, Metrics]]] = deque()
    collected: dict[int, dict[int, Metrics]] = {}
    late: Report | None = None
    ahead = max(counts)

    def awaited(batch: int) -> int:
        return len(counts) if batch >= ahead else sum(count <= batch for count in counts)

    def finished(results: list[tuple[Turn, Metrics]]) -> Iterator[Report]:
        jax.block_until_ready([metrics for _, metrics in results])
        for turn, metrics in results:
            if turn.updates():
                collected.setdefault(turn.batch, {})[turn.module] = metrics
        for batch in sorted(b for b, found in collected.items() if len(found) == awaited(b)):
            found = collected.pop(batch)
            metrics_of = tuple(found.get(k, {}) for k in range(len(counts)))
            yield Report((batch + 1,) * len(counts), metrics_of, _in_flight, step=batch + 1)

    def reports() -> Iterator[Report]:
        for tick in ticks:
            # The guard is on inside a tick only: a generator must not leave it on in its caller.
            with jax.transfer_guard("disallow"):
                waiting.append(dispatch(tick))
            while len(waiting) > in_flight:
                yield from finished(waiting.popleft())
        while waiting:
            yield from finished(waiting.popleft())

    for report in reports():
        if late is not None:
            yield late
        late = report
    if late is not None:
        late.snapshot = snapshot
        yield late


def run_turns(
    engine: Any,
    state: EngineState,
    source: Source,
    until: int,
    stop: Callable[[], bool],
    move: Callable[..., tuple[Message, Any]] | None = None,
    overlap: bool = False,
) -> Iterator[Report]:
    """Runs the schedule of the method with a program for each turn; see `Engine.run`.

    Args:
      engine: has `spec`, `placement`, `total_steps`, `ticks_in_flight`, and by (module, kind) `programs`.
      move: moves messages to the devices of their reader, see `methods.base.Post`.
      overlap: modules work at once.
    """
    post, read, made = Post(engine.spec, state.modules, move), reader(source), counts(state)

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

    ticks = engine.spec.method.schedule(made, until, max(until, engine.total_steps), stop, overlap)
    yield from run_ticks(
        ticks,
        dispatch,
        engine.ticks_in_flight,
        made,
        lambda flight=True: EngineState(post.closed()),
    )


def reader(source: Source) -> Callable[[int], Batch]:
    """Returns what gives batch after batch, from the first one that is asked for."""
    batches: Iterator[Batch] | None = None

    def read(number: int) -> Batch:
        nonlocal batches
        batches = source.batches(number) if batches is None else batches
        return next(batches)

    return read


def _in_flight(flight: bool = True) -> EngineState:
    raise RuntimeError("batches are in the pipe: only the last report of a run gives a snapshot")


def counts(state: EngineState) -> list[int]:
    """The updates of each module."""
    return [int(jax.device_get(module.updates)) for module in state.modules]


def place_modules(
    states: Sequence[ModuleState], placement: Placement, put: Callable[[Any, Any], Any]
) -> EngineState:
    """Puts each module's state, whole, on every device of its group; of messages that wait, each device has its examples."""
    placed = []
    for k, waiting in enumerate(states):
        state, mail = opened(waiting)
        where = {"above": placement.message(k), "below": (placement.message(k), placement.split(k))}
        moved = {
            port: tuple(put(message, where[port]) for message in messages)
            for port, messages in mail.items()
        }
        placed.append(closed(put(state, placement.replicated(k)), moved))
    return EngineState(tuple(placed))
