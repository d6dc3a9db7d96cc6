"""The paper's asynchronous protocol on one device (Belilovsky et al. 2020, Algorithm 2): seeded, exactly repeatable.

One module works at a time. Which one is drawn, a slowed module less often; it reads a packet from the ring at its entrance,
updates, and writes the packet it made to the ring of the next. Every module makes the same number of updates: one that is done goes
on feeding its successor. Nothing here says how fast a real asynchronous run would be.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dgl_jax.config import ReplaySettings
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
from dgl_jax.fields import choice
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import drawn, in_order, never
from dgl_jax.spec import Traffic, TrainSpec


@dataclass(frozen=True)
class SimulatedOptions(AsynchronousOptions):
    """Of one module at a time."""

    order: str = choice(
        "random", "ordered"
    )  # drawn in proportion to 1 / slowdown, or one after the other


class SimulatedEngine(Asynchronous):
    """All modules on one device group, one at a time, with replay between them."""

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
        if (
            engine.order == "ordered"
        ):  # all modules end in the same round: none of them ever only feeds
            self._feeding = ()
        self.module_of = (
            in_order(modules)
            if engine.order == "ordered"
            else drawn(modules, engine.slowdown, spec.seed)
        )

    def traffic(self) -> Traffic:
        """Nothing crosses devices: what the encoded arrays weigh."""
        return self.spec.traffic()

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`. Every report gives a snapshot, good until the next."""
        self.prepare()
        rings = flight_of(state)
        # A ring that came out of a checkpoint already holds the newest codebook.
        publishers = [
            Publisher(hop, known=bool(ring.newest_codebook[0]))
            for hop, ring in zip(self.hops, rings.rings, strict=True)
        ]
        parts = zip(state.modules, counts(state), [*publishers, None], strict=True)
        modules = [RunningModule(k, *part) for k, part in enumerate(parts)]
        turns = Turns(self, rings, source, self.total)

        def snapshot(flight: bool = True) -> EngineState:
            # Between turns every state is there.
            return EngineState(
                tuple(module.whole(module.state) for module in modules), rings if flight else None
            )  # type: ignore[arg-type]

        while min(module.updates for module in modules) < until and not stop():
            k = self._next(rings)
            if k is None:
                continue
            with jax.transfer_guard("disallow"):
                metrics = self._turn(modules, k, turns)
            if metrics is not None:
                brought: list[Metrics] = [{} for _ in modules]
                brought[k] = metrics
                yield Report(
                    tuple(module.updates for module in modules),
                    tuple(brought),
                    snapshot,
                    step=min(m.updates for m in modules),
                )

    def _next(self, flight: Rings) -> int | None:
        """The module that works now, which then has a packet to read; None where a turn is lost."""
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
        """Gives module k its turn and returns the metrics of its update; None if it is done and only feeds the next one."""
        module = modules[k]
        if turns.finished(module) and module.publisher is None:  # the last one has nobody to feed
            return None
        intake = turns.take(k)
        assert intake is not None, "a turn is given to modules that have something to read"
        made = turns.run(module, intake)
        module.updates += made.metrics is not None
        turns.hand_on(modules, k, made, turns.rings.turn - 1, turns.rings.turn)
        return made.metrics


def _make(run: EngineInputs, options: SimulatedOptions) -> SimulatedEngine:
    check_rings(run)
    placement = run.checked(one_group(run.devices[:1], len(run.spec.modules)))
    return SimulatedEngine(run.spec, placement, run.total_steps, options, run.replay)


ENGINES.ship(simulated=EngineKind(_make, SimulatedOptions, asynchronous=True))
