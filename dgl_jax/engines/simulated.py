"""Engine `simulated`: the paper's asynchronous protocol on one device, seeded and repeatable.

This is Algorithm 2 of Belilovsky et al. (2020). One module works at a time. It is drawn at random
(a slowed module less often), takes a message from the ring at its entrance, updates, and writes its
own message to the ring of the next module. All modules make the same number of updates; a finished
module keeps feeding the next one. The engine predicts accuracy, not the speed of a real
asynchronous run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dgl_jax.config import ReplaySettings
from dgl_jax.config.fields import choice
from dgl_jax.config.registry import ENGINES
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.asynchronous import (
    Asynchronous,
    AsynchronousOptions,
    RunningModule,
    Turns,
    check_rings,
    flight_of,
)
from dgl_jax.engines.base import EngineInputs, EngineKind, EngineState, Publisher, Report, counts
from dgl_jax.engines.flight import Rings
from dgl_jax.engines.placement import Placement, one_group
from dgl_jax.schedule import drawn, in_order, never
from dgl_jax.spec import Traffic, TrainSpec


@dataclass(frozen=True)
class SimulatedOptions(AsynchronousOptions):
    """Options of the engine `simulated`.

    Attributes:
      order: draw modules with probability proportional to 1 / slowdown, or let them take turns.
    """

    order: str = choice("random", "ordered")


class SimulatedEngine(Asynchronous):
    """Asynchronous engine that runs one module at a time on one device group.

    Attributes:
      total: number of updates per module at the end of training.
      module_of: returns the module that has turn n.
    """

    continuous = False
    unit = "turns"

    def __init__(
        self,
        spec: TrainSpec,
        placement: Placement,
        total: int,
        engine: SimulatedOptions,
        replay: ReplaySettings,
    ):
        super().__init__(spec, placement, engine, replay)
        self.total, modules = total, len(spec.modules)
        if engine.order == "ordered":
            # All modules finish in the same round, so no forward-only program ever runs.
            self._feeding = ()
        self.module_of = (
            in_order(modules)
            if engine.order == "ordered"
            else drawn(modules, engine.slowdown, spec.seed)
        )

    def traffic(self) -> Traffic:
        """Returns the sizes of the encoded arrays, because no message crosses devices."""
        return self.spec.traffic()

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`.

        Every report can return a snapshot, which is valid until the next report.
        """
        self.prepare()
        rings = flight_of(state)
        # A restored ring already holds the newest codebook.
        publishers = [
            Publisher(hop.period, known=bool(ring.newest_codebook[0]))
            for hop, ring in zip(self.hops, rings.rings, strict=True)
        ]
        module_args = zip(state.modules, counts(state), [*publishers, None], strict=True)
        modules = [RunningModule(k, *args) for k, args in enumerate(module_args)]
        turns = Turns(self, rings, source, self.total)

        def snapshot(flight: bool = True) -> EngineState:
            # No state is None here, because snapshots are taken between turns.
            states = tuple(module.whole(module.state) for module in modules)  # type: ignore[arg-type]
            return EngineState(states, rings if flight else None)

        while min(module.updates for module in modules) < until and not stop():
            k = self._next(rings)
            if k is None:
                continue
            with jax.transfer_guard("disallow"):
                metrics = self._turn(modules, k, turns)
            if metrics is not None:
                metrics_by_module: list[Metrics] = [{} for _ in modules]
                metrics_by_module[k] = metrics
                yield Report(
                    tuple(module.updates for module in modules),
                    tuple(metrics_by_module),
                    snapshot,
                    step=min(module.updates for module in modules),
                )

    def _next(self, flight: Rings) -> int | None:
        """Returns the module that works now, or None if the drawn module has nothing to read.

        Modules that were drawn earlier and had to wait for a message come first.
        """
        for waiting in map(int, np.flatnonzero(flight.waiting)):
            if flight.ring(waiting).ready():
                flight.waiting[waiting] = 0
                return waiting
        k = self.module_of(flight.turn)
        flight.turn += 1
        if k == 0 or flight.ring(k).ready():
            return k
        if self.replay.at_limit == "wait":
            flight.waiting[k] = 1
        else:
            flight.skipped[k] += 1
        return None

    def _turn(self, modules: Sequence[RunningModule], k: int, turns: Turns) -> Metrics | None:
        """Runs a turn of module k; returns its metrics, or None if the module has finished."""
        module = modules[k]
        if turns.finished(module) and module.publisher is None:  # the last module feeds nobody
            return None
        intake = turns.take(k)
        assert intake is not None, "a turn was given to a module with nothing to read"
        outcome = turns.run(module, intake)
        module.updates += outcome.metrics is not None
        turns.deliver(modules, k, outcome, turns.rings.turn - 1, turns.rings.turn)
        return outcome.metrics


def _make(run: EngineInputs, options: SimulatedOptions) -> SimulatedEngine:
    check_rings(run)
    placement = run.checked(one_group(run.devices[:1], len(run.spec.modules)))
    return SimulatedEngine(run.spec, placement, run.total_steps, options, run.replay)


ENGINES.ship(simulated=EngineKind(_make, SimulatedOptions, asynchronous=True))
