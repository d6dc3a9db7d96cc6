"""Interface of an engine, with the state and the reports that its callers see."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.config.fields import number, option
from dgl_jax.config.registry import Kind
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines import world
from dgl_jax.engines.feed import Residence
from dgl_jax.engines.placement import Placement, assign, check_batch
from dgl_jax.engines.transfer import is_here
from dgl_jax.errors import UserError
from dgl_jax.methods.post import closed, opened
from dgl_jax.profile.flops import module_flops
from dgl_jax.schedule import never
from dgl_jax.spec import Traffic, TrainSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineInputs:
    """Inputs from which every engine is built.

    Attributes:
      spec: device-independent description of the training run.
      devices: the devices the engine may use.
      replay: settings of the replay rings; only asynchronous engines read them.
      total_steps: updates that every module has at the end of training.
      log_every: steps between two records of the training metrics; 0 if there are none.
      every: steps between two evaluations, and between two checkpoints; empty if there are none.
    """

    spec: TrainSpec
    devices: Sequence[jax.Device]
    replay: ReplaySettings
    total_steps: int
    log_every: int = 0
    every: tuple[int, ...] = ()

    def checked(self, placement: Placement) -> Placement:
        """Returns `placement`; raises UserError if a device group does not divide the batch."""
        check_batch(self.spec.batch_size, placement.sizes(), self.spec.accumulate)
        return placement

    def placed(self, group_sizes: Sequence[int]) -> Placement:
        """Returns a device group per module, and logs how many devices stay idle.

        Raises:
          UserError: the sizes or the batch do not fit.
        """
        modules = len(self.spec.modules)
        costs = (
            [body + head for body, head in module_flops(self.spec)]
            if not group_sizes and len(self.devices) < modules
            else ()
        )
        placement = self.checked(assign(self.devices, modules, group_sizes, costs))
        if world.count() > 1:
            placement.check_processes()
        if idle := len(self.devices) - placement.count():
            _LOG.info(
                "%d of %d devices stay idle; config.engine.group_sizes can use them",
                *(idle, len(self.devices)),
            )
        return placement


@dataclass(frozen=True)
class EngineKind(Kind):
    """Registry entry of an engine: `make(inputs: EngineInputs, options)` returns an `Engine`.

    Attributes:
      asynchronous: modules read possibly stale messages from replay rings.
      continuous: see `Engine`.
      family: engines of one family compute the same numbers and can read each other's checkpoints;
        "" if the engine is the only one of its family.
      distributed: a run may have several processes.
    """

    asynchronous: bool = False
    continuous: bool = False
    family: str = ""
    distributed: bool = False


@dataclass(frozen=True)
class PlacedOptions(EngineSettings):
    """Options of engines that distribute the modules over device groups.

    Attributes:
      group_sizes: number of devices per module; empty: as equal as the devices allow.
    """

    group_sizes: tuple[int, ...] = option((), free=True)

    def check(self, settings: Any) -> None:
        """Raises UserError if a module has no device."""
        if any(n < 1 for n in self.group_sizes):
            raise UserError(
                f"config.engine.group_sizes={self.group_sizes}: every module needs at least one "
                "device"
            )


@dataclass(frozen=True)
class SynchronousOptions(PlacedOptions):
    """Options of engines in which all modules advance together.

    Attributes:
      ticks_in_flight: number of ticks that the host may dispatch ahead of the devices.
    """

    ticks_in_flight: int = number(2, 1, 64, free=True)


class Flight(Protocol):
    """Host-side mutable state of an asynchronous run, such as rings and counters, for checkpoints.

    Attributes:
      unit: unit of the times that `recent` returns.
    """

    unit: str

    def snapshot(self) -> Any:
        """Copies everything into a pytree of host arrays for a checkpoint."""

    def recent(self) -> list[tuple[int, float, float]]:
        """Returns the newest turns as (module, begin, end), oldest first."""


@dataclass(frozen=True)
class EngineState:
    """State of a run, with one checkpoint format for every engine and device layout.

    Attributes:
      modules: one state per module.
      flight: what is in flight between modules; None in synchronous engines.
    """

    modules: tuple[ModuleState, ...]
    flight: Flight | None = None


class Snapshot(Protocol):
    """Function that returns the state of an engine."""

    def __call__(self, flight: bool = True) -> EngineState:
        """Returns the states of the modules and, if `flight` is true, what is in flight.

        Evaluation passes `flight=False`, because it needs the modules alone and copying rings takes
        time.
        """


@dataclass
class Report:
    """Progress report: one per batch, or per update if modules update on different batches.

    Attributes:
      updates: number of updates made by each module.
      metrics: metrics of each module's newest update, as device scalars that are already computed;
        empty for a module that this report does not cover.
      snapshot: returns the EngineState. In a synchronous engine only the last report of a run can
        do so, because batches are in flight before it.
      step: the step that the run has reached, which is the number of updates that every module has
        made, unless the method defines it (`Method.progress`). It decreases when a module is
        restarted from a checkpoint.
      module: the module that made the newest update, if the method trains one module after the
        other; otherwise None.
      at: time at which the update finished, in seconds of a monotonic clock; None if every
        report is read at once. Updates of one dispatch finish at the same time.
      compiled: True if a program has been compiled since the previous report.
    """

    updates: tuple[int, ...]
    metrics: tuple[Metrics, ...]
    snapshot: Snapshot
    step: int = field(kw_only=True)
    module: int | None = field(default=None, kw_only=True)
    at: float | None = None
    compiled: bool = False


class Engine(Protocol):
    """Runs the turns of a schedule: decides which module works when, and on which devices.

    Attributes:
      spec: device-independent description of the training run.
      placement: device group of each module.
      residence: keeps the data set on the devices of the first module, if it fits; set by the
        caller.
      continuous: true if workers keep training while the caller handles reports. One `run` call
        then spans all of training, and evaluation and checkpoints use snapshots.
      recover: returns a module's state from the newest checkpoint, or None if there is no
        checkpoint; used by engines that keep running when a module fails.
    """

    spec: TrainSpec
    placement: Placement
    residence: Residence
    continuous: bool
    recover: Callable[[int], ModuleState | None] | None

    def traffic(self) -> Traffic:
        """Returns the number of bytes per image that messages take on each hop."""

    def init(self) -> EngineState:
        """Returns a fresh state on the engine's devices."""

    def place(self, state: EngineState) -> EngineState:
        """Moves a state (restored, or from another engine) to the engine's devices."""

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """Completes a restored state with what was in flight.

        Args:
          state: restored states of the modules.
          saved: the flight's snapshot from the checkpoint; None if the checkpoint has none.

        Returns:
          The state on the engine's devices, ready for `run`.
        """

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Returns the engine's measurements of itself, by metric name."""

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until step `until`, at which every module usually has `until` updates.

        Args:
          state: state to start from; its arrays are donated.
          source: random-access source of batches.
          until: step at which to stop, see `Report.step`.
          stop: polled between turns. After it returns true no new batch enters, and a synchronous
            run ends once all modules have made their updates on the batches that have entered.

        Yields:
          Progress reports in the order in which the updates finished.
        """


class Publisher:
    """Decides which messages of a hop carry their codebook, which the reader keeps for later ones.

    Args:
      period: updates of the sender between two codebooks; 0 if there are none.
      known: true if the reader already has the newest codebook.
    """

    def __init__(self, period: int, known: bool = False):
        self._period, self._known = period, known

    def fresh(self, codebook: Any, updates: int | None) -> Any:
        """Returns the codebook to send along with a message, or None if the reader already has it.

        The reader counts as having the codebook from then on, so this must be called once per
        message, in order.

        Args:
          codebook: the codebook that the message is encoded with.
          updates: the producer's number of updates before the update that produced the message;
            None if the producer is finished and only forwards, in which case it publishes nothing.
        """
        publishes = updates is not None and self._period and updates % self._period == 0
        if not self._period or (self._known and not publishes):
            return None
        self._known = True
        return codebook

    def forget(self) -> None:
        """Sends the codebook with the next message, because the producer was restarted."""
        self._known = False


def counts(state: EngineState) -> list[int]:
    """Returns the number of updates of each module, as host integers.

    In a run of several processes all of them have to call it.
    """
    return held(state, lambda module: module.updates)


def held(state: EngineState, read: Callable[[ModuleState], Any]) -> list[Any]:
    """Returns a number that each module's state holds, from the process where the module is.

    Args:
      state: states of the modules.
      read: returns a scalar of a state; None if it has none.
    """
    values = {k: read(module) for k, module in enumerate(state.modules)}
    here = {
        str(k): int(jax.device_get(x)) for k, x in values.items() if x is not None and is_here(x)
    }
    every = world.merged(here)
    return [every.get(str(k)) for k in values]


def place_modules(
    states: Sequence[ModuleState], placement: Placement, put: Callable[[Any, Any], Any]
) -> EngineState:
    """Puts each module's state, replicated, on every device of its group.

    Messages that wait at a module are moved too, with their examples split over the devices of the
    group.

    Args:
      states: one state per module.
      placement: device group of each module.
      put: moves a pytree to a sharding.
    """
    return EngineState(
        tuple(put(state, module_shardings(k, state, placement)) for k, state in enumerate(states))
    )


def module_shardings(k: int, state: ModuleState, placement: Placement) -> Any:
    """Returns the sharding of every array of a module's state; see `place_modules`."""
    rest, waiting = opened(state)
    ports = {"above": placement.message(k), "below": (placement.message(k), placement.split(k))}
    shardings = jax.tree.map(lambda _: placement.replicated(k), rest)
    return closed(shardings, {port: (ports[port],) * len(waiting[port]) for port in waiting})
