"""Modules at the same time on their own devices: asynchronous dispatch from one thread fills the pipe.

`registers[k]` is the packet that waits at module k's entrance, already on its devices. A tick dispatches the deepest module
first: all it needs was made a tick ago, so the devices of all modules start at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    Publisher,
    Report,
    Synchronous,
    SynchronousOptions,
    run_ticks,
    updates_of,
)
from dgl_jax.engines.placement import Placement, put
from dgl_jax.engines.program import jitted
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import Tick, Turn, fused, never, pipelined
from dgl_jax.spec import Meter, Traffic, TrainSpec
from dgl_jax.types import Batch, Header, Message, Packet


class PipelineEngine(Synchronous):
    """Module k works on device group k; its packet moves to group k + 1 while group k begins the next batch."""

    def __init__(self, spec: TrainSpec, placement: Placement, ticks_in_flight: int = 2):
        self.spec = spec
        self.placement, self.hops = placement, spec.hops
        self.meters = [Meter() for _ in spec.modules[1:]]  # of what crossed each hop
        self.publishers: list[Publisher] = []  # of each hop, while a run lasts
        self.published: list[Any] = []  # the codebook that each module has at its entrance, on its devices
        self.ticks_in_flight = ticks_in_flight
        self.programs = [jitted(spec, k, placement) for k in range(len(spec.modules))]

    def traffic(self) -> Traffic:
        """Counted from the packets that crossed devices; by shape where modules share a device."""
        return self.spec.traffic(self.meters)

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        states, start = list(state.modules), updates_of(state)
        modules = len(self.spec.modules)
        batches = source.batches(start)
        registers: list[Packet | None] = [None] * modules
        self.publishers = [Publisher(hop) for hop in self.hops]
        self.published = [()] * modules

        def receive(turn: Turn) -> tuple[Any, Any]:
            if turn.module == 0:
                batch: Batch = self.placement.put_batch(next(batches), 0)
                return batch, batch.context
            packet, registers[turn.module] = registers[turn.module], None
            assert packet is not None, "the schedule gave a turn to a module whose entrance is empty"
            return Message(packet.payload, packet.codebook), packet.context

        def dispatch(tick: Tick) -> list[tuple[Turn, Metrics]]:
            results = []
            for turn in tick:
                k = turn.module
                incoming, context = receive(turn)
                states[k], coded, metrics = self.programs[k](states[k], incoming, context)
                if k + 1 < modules:
                    carried = self.spec.carried(k + 1, context, coded.context)
                    packet = Packet(coded.payload, carried, Header(turn.batch, turn.batch + 1), coded.codebook)
                    registers[k + 1] = self._move(packet, k + 1)
                results.append((turn, metrics))
            return results

        # On one device nothing overlaps: each batch goes all the way through, so that a single packet waits at a time.
        schedule = pipelined if self.placement.count() > 1 else fused
        ticks = schedule(modules, start, until, stop)
        snapshot = lambda flight=True: EngineState(tuple(states))  # noqa: E731
        yield from run_ticks(ticks, dispatch, self.ticks_in_flight, modules, snapshot)

    def _move(self, packet: Packet, module: int) -> Packet:
        """To the devices of a module, with a codebook that was just published; nothing to do where they are the same."""
        if not self.placement.crosses(module - 1):
            return packet
        payload, context = put((packet.payload, packet.context), self.placement.split(module))
        fresh = self.publishers[module - 1].fresh(packet.codebook, packet.header.sequence)
        if fresh is not None:
            fresh = self.published[module] = put(fresh, self.placement.replicated(module))
        self.meters[module - 1].count(payload, context, fresh)
        return Packet(payload, context, packet.header, self.published[module])


def _make(run: EngineInputs, options: SynchronousOptions) -> PipelineEngine:
    return PipelineEngine(run.spec, run.placed(options.group_sizes), options.ticks_in_flight)


ENGINES.ship(pipeline=EngineKind(_make, SynchronousOptions, family="synchronous"))
