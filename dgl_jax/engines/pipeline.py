"""Modules at the same time on their own devices: asynchronous dispatch from one thread fills the pipe.

What waits at a module's entrance is already on its devices. A tick of DGL dispatches the deepest module first: all it needs was
made a tick ago, so the devices of all modules start at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dgl_jax.data import Source
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    Publisher,
    Report,
    Synchronous,
    SynchronousOptions,
    run_turns,
)
from dgl_jax.engines.placement import Placement, put
from dgl_jax.engines.program import Programs, jitted
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import never
from dgl_jax.spec import Meter, Traffic, TrainSpec
from dgl_jax.types import Context, Message


class PipelineEngine(Synchronous):
    """Module k works on device group k; its packet moves to group k + 1 while group k begins the next batch."""

    def __init__(
        self, spec: TrainSpec, placement: Placement, ticks_in_flight: int = 2, total_steps: int = 0
    ):
        self.spec = spec
        self.placement, self.hops = placement, spec.hops
        self.meters = [Meter() for _ in spec.modules[1:]]  # of what crossed each hop
        self.publishers: list[Publisher] = []  # of each hop, while a run lasts
        self.published: list[
            Any
        ] = []  # the codebook that each module has at its entrance, on its devices
        self.ticks_in_flight, self.total_steps = ticks_in_flight, total_steps
        self.programs = Programs(
            lambda turn: jitted(spec, turn[0], placement, turn[1])
        )  # by module and kind

    def traffic(self) -> Traffic:
        """Counted from the packets that crossed devices; by shape where modules share a device."""
        return self.spec.traffic(self.meters)

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        self.publishers = [Publisher(hop) for hop in self.hops]
        self.published = [()] * len(state.modules)
        # On one device nothing overlaps: each batch goes all the way through, so that a single packet waits at a time.
        yield from run_turns(
            self, state, source, until, stop, self._move, overlap=self.placement.count() > 1
        )

    def _move(
        self, k: int, number: int, message: Message, context: Context | None
    ) -> tuple[Message, Any]:
        """To the devices of module k, with a codebook that was just published; nothing to do where they are the same."""
        if context is None:  # from above
            if self.placement.crosses(k):
                self.meters[k].count_from_above(message)
                message = put(message, self.placement.message(k))
            return message, context
        if not self.placement.crosses(k - 1):
            return message, context
        payload, context = put((message.payload, context), self.placement.split(k))
        fresh = self.publishers[k - 1].fresh(message.codebook, number)
        if fresh is not None:
            fresh = self.published[k] = put(fresh, self.placement.replicated(k))
        self.meters[k - 1].count(payload, context, fresh)
        return Message(payload, self.published[k]), context


def _make(run: EngineInputs, options: SynchronousOptions) -> PipelineEngine:
    return PipelineEngine(
        run.spec, run.placed(options.group_sizes), options.ticks_in_flight, run.total_steps
    )


ENGINES.ship(pipeline=EngineKind(_make, SynchronousOptions, family="synchronous"))
