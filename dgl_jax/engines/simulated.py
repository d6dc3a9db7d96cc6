"""The paper's asynchronous protocol on one device (Belilovsky et al. 2020, Algorithm 2): seeded, exactly repeatable.

One module works at a time. Which one is drawn, a slowed module less often; it reads a packet from the ring at its entrance,
updates, and writes the packet it made to the ring of the next. Every module makes the same number of updates: one that is done goes
on feeding its successor. Nothing here says how fast a real asynchronous run would be.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.asynchronous import Asynchronous, Rings, flight_of
from dgl_jax.engines.base import EngineState, Report, counts
from dgl_jax.engines.placement import Placement
from dgl_jax.schedule import drawn, in_order, never
from dgl_jax.spec import Traffic, TrainSpec
from dgl_jax.types import Header


class SimulatedEngine(Asynchronous):
    """All modules on one device group, one at a time, with replay between them."""

    continuous = False
    unit = "turns"

    def __init__(self, spec: TrainSpec, placement: Placement, total: int, engine: EngineSettings, replay: ReplaySettings):
        super().__init__(spec, placement, engine, replay)
        self.total, modules = total, len(spec.modules)
        if engine.order == "ordered":  # all modules end in the same round: none of them ever only feeds
            self._feeding = ()
        self.module_of = in_order(modules) if engine.order == "ordered" else drawn(modules, engine.slowdown, spec.seed)

    def traffic(self) -> Traffic:
        """Nothing crosses devices: what the encoded arrays weigh."""
        return self.spec.traffic()

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`. Every report gives a snapshot, good until the next."""
        self.prepare()
        rings = flight_of(state)
        states, updates = list(state.modules), counts(state)
        batches = source.batches(rings.batches)

        def snapshot(flight: bool = True) -> EngineState:
            return EngineState(tuple(states), rings if flight else None)

        while min(updates) < until and not stop():
            k = self._next(rings)
            if k is None:
                continue
            with jax.transfer_guard("disallow"):
                metrics = self._work(k, states, updates, rings, batches)
            if metrics is not None:
                brought: list[Metrics] = [{} for _ in states]
                brought[k] = jax.block_until_ready(metrics)
                yield Report(tuple(updates), tuple(brought), snapshot, step=min(updates))

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

    def _work(self, k: int, states: list[Any], updates: list[int], flight: Rings, batches: Iterator[Any]) -> Metrics | None:
        """One turn of module k; None where it is done and only feeds the next one (or has none to feed)."""
        done, last = updates[k] >= self.total, len(states) - 1
        if done and k == last:
            return None
        if k == 0:
            incoming: Any = self.placement.put_batch(next(batches), 0)
            targets, sequence = incoming.targets, flight.batches
            flight.batches += 1
        else:
            sample = flight.sample(k)
            assert sample is not None, "a turn is given to modules that have something to read"
            sequence = sample.packet.header.sequence
            incoming, targets = self.fetch(k, flight.ring(k), sample.packet)
        metrics: Metrics | None = None
        before = updates[k]
        if done:
            coded = self.feeds[k](states[k], incoming)
        else:
            states[k], coded, metrics = self.programs[k](states[k], incoming, targets)
            updates[k] += 1
        if k < last:
            hop, has_one = self.hops[k], flight.ring(k + 1).newest_codebook[0]
            fresh = bool(hop.period) and (not has_one or (not done and hop.publishes(before)))
            payload, targets, codebook = jax.device_get((coded.payload, targets, coded.codebook if fresh else None))
            flight.add(k, payload, targets, Header(sequence, updates[k]), codebook)
        flight.turns.append((k, flight.turn - 1, flight.turn))
        return metrics
