"""Modules at the same time on their own devices: asynchronous dispatch from one thread fills the pipe.

`registers[k]` is the packet that waits at module k's entrance, already on its devices. A tick of DGL dispatches the deepest module
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
    counts,
    reader,
    run_ticks,
)
from dgl_jax.engines.placement import Placement, put
from dgl_jax.engines.program import Programs, jitted
from dgl_jax.methods.base import closed, delivered, opened
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import Meter, Traffic, TrainSpec
from dgl_jax.types import Context, Header, Inbox, Message, Packet


class PipelineEngine(Synchronous):
    """Module k works on device group k; its packet moves to group k + 1 while group k begins the next batch."""

    def __init__(self, spec: TrainSpec, placement: Placement, ticks_in_flight: int = 2, total_steps: int = 0):
        self.spec = spec
        self.placement, self.hops = placement, spec.hops
        self.meters = [Meter() for _ in spec.modules[1:]]  # of what crossed each hop
        self.publishers: list[Publisher] = []  # of each hop, while a run lasts
        self.published: list[Any] = []  # the codebook that each module has at its entrance, on its devices
        self.ticks_in_flight, self.total_steps = ticks_in_flight, total_steps
        self.programs = Programs(lambda turn: jitted(spec, turn[0], placement, turn[1]))  # by module and kind

    def traffic(self) -> Traffic:
        """Counted from the packets that crossed devices; by shape where modules share a device."""
        return self.spec.traffic(self.meters)

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        method, modules, read = self.spec.method, len(self.spec.modules), reader(source)
        states, mails = map(list, zip(*map(opened, state.modules), strict=True))
        registers: list[Packet | None] = [None] * modules
        self.publishers = [Publisher(hop) for hop in self.hops]
        self.published = [()] * modules

        def receive(turn: Turn) -> tuple[Any, Context]:
            k = turn.module
            if k == 0:
                batch = self.placement.put_batch(read(turn.batch), 0)
                return batch, batch.context
            if "below" in mails[k]:
                return mails[k]["below"][0]
            packet, registers[k] = registers[k], None
            assert packet is not None, "the schedule gave a turn to a module whose entrance is empty"
            return Message(packet.payload, packet.codebook), packet.context

        def send_up(packet: Packet, k: int) -> None:
            if "below" in mails[k]:
                mails[k] = delivered(mails[k], "below", (Message(packet.payload, packet.codebook), packet.context))
            else:
                registers[k] = packet

        def dispatch(tick: Tick) -> list[tuple[Turn, Metrics]]:
            results = []
            for turn in tick:
                k = turn.module
                reads, _ = method.ports(self.spec, k, turn.kind)
                incoming, context = (None, {}) if reads.below is None else receive(turn)
                inbox = Inbox(incoming, None if reads.above is None else mails[k]["above"][0])
                states[k], sent, metrics = self.programs[k, turn.kind](states[k], inbox, context)
                if sent.above is not None:
                    carried = self.spec.carried(k + 1, context, sent.above.context)
                    packet = Packet(sent.above.payload, carried, Header(turn.batch, turn.batch + 1), sent.above.codebook)
                    send_up(self._move(packet, k + 1), k + 1)
                if sent.below is not None:
                    mails[k - 1] = delivered(mails[k - 1], "above", self._move_down(sent.below, k - 1))
                results.append((turn, metrics))
            return results

        # On one device nothing overlaps: each batch goes all the way through, so that a single packet waits at a time.
        overlap = self.placement.count() > 1
        made = counts(state)
        ticks = method.schedule(made, until, max(until, self.total_steps), stop, overlap)
        snapshot = lambda flight=True: EngineState(tuple(map(closed, states, mails)))  # noqa: E731
        yield from run_ticks(ticks, dispatch, self.ticks_in_flight, made, snapshot)

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

    def _move_down(self, message: Message, module: int) -> Message:
        """Moves a message to the devices of the module below."""
        if not self.placement.crosses(module):
            return message
        self.meters[module].came_down(message)
        return put(message, self.placement.message(module))


def _make(run: EngineInputs, options: SynchronousOptions) -> PipelineEngine:
    return PipelineEngine(run.spec, run.placed(options.group_sizes), options.ticks_in_flight, run.total_steps)


ENGINES.ship(pipeline=EngineKind(_make, SynchronousOptions, family="synchronous"))
