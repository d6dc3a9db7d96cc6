"""Engine `pipeline`: modules work at the same time on their own devices, dispatched by one thread.

A sent message moves to its reader's devices at once. Under `dgl` and `layerwise` a tick
dispatches the deepest module first: the previous tick produced all its inputs, so the devices of
all modules start at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dgl_jax.config.registry import ENGINES
from dgl_jax.core.module import ModuleState
from dgl_jax.data import Source
from dgl_jax.engines import world
from dgl_jax.engines.advance import compile_together, turn_shapes
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    Publisher,
    Report,
    Snapshot,
    SynchronousOptions,
    held,
)
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.program import Programs, elsewhere, jitted
from dgl_jax.engines.synchronous import Synchronous, run_turns
from dgl_jax.engines.transfer import put
from dgl_jax.methods.base import steps_alone
from dgl_jax.schedule import never
from dgl_jax.spec import Meter, Traffic, TrainSpec
from dgl_jax.types import Context, Message


@dataclass(frozen=True)
class Drained(EngineState):
    """State after a run, from which the engine continues without sending all codebooks again.

    Attributes:
      ended: identifies the run, after which every reader has its newest codebook.
      drained: the same tuple as `modules`, unless somebody has replaced that one.
    """

    ended: object = None
    drained: tuple[ModuleState, ...] = ()


class PipelineEngine(Synchronous):
    """Synchronous engine that runs module k on device group k.

    The messages of module k move to group k + 1 while group k starts the next batch.

    Attributes:
      meters: bytes that crossed each hop, of batches that are reported as finished. Others are left
        out, because how many are in flight depends on where a run stops.
      publishers: the publisher of each hop in each direction, by the index of the
        module that reads its messages and the port that they arrive at.
      published: newest codebook (at the port "parameters": newest publication of parameters) that
        arrived there, on the devices of that module.
      programs: jitted programs by (module, kind).
    """

    def __init__(
        self, spec: TrainSpec, placement: Placement, ticks_in_flight: int = 2, total_steps: int = 0
    ):
        self.spec = spec
        self.placement, self.hops = placement, spec.hops
        self.meters = [Meter() for _ in spec.modules[1:]]
        self.publishers: dict[tuple[int, str], Publisher] = {}
        self.published: dict[tuple[int, str], Any] = {}
        self._sent: list[int | None] = []
        self._counts: list[tuple[int, int, Meter]] = []  # batch, hop
        self._run: object = None
        self.ticks_in_flight, self.total_steps = ticks_in_flight, total_steps
        self.programs = Programs(self._program)
        self._prepared = False

    def _program(self, turn: tuple[int, str]) -> Any:
        """Returns the program of a turn (module, kind); of modules elsewhere only its shapes."""
        make = jitted if self.placement.mine(turn[0]) else elsewhere
        return make(self.spec, turn[0], self.placement, turn[1])

    def traffic(self) -> Traffic:
        """Returns bytes per image, measured once messages have crossed devices."""
        return self.spec.traffic(self.meters)

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until step `until`; see `Engine.run`."""
        if not (
            isinstance(state, Drained)
            and state.drained is state.modules
            and state.ended is self._run
        ):
            self._counts = []
            self.published = {}
            self.publishers = {}
            for k, hop in enumerate(self.hops):
                self.publishers[k + 1, "below"] = Publisher(hop.period)
                self.publishers[k, "above"] = Publisher(hop.period)
                self.publishers[k, "parameters"] = Publisher(hop.refresh or 1)
        self._run = object()
        self._prepare()
        self._sent = held(state, lambda module: module.extras.get("sent"))
        # On one device nothing overlaps. Each batch then passes all modules before the next one
        # enters, so that only one message waits at a time.
        overlap = self.placement.count() > 1
        for report in run_turns(self, state, source, until, stop, self._move, overlap=overlap):
            report.snapshot = partial(_drained, report.snapshot, self._run)
            self._count(report)
            yield report

    def _prepare(self) -> None:
        """Compiles the programs of modules that work alone, at the same time; the first time only.

        Otherwise they would compile one after the other, in their first turns.
        """
        # Several processes compile the programs that they share in one order.
        if self._prepared or world.count() > 1 or not steps_alone(self.spec):
            return
        self._prepared = True

        def compile_module(k: int, program: Any) -> None:
            program.lower(*turn_shapes(self.spec, self.placement, k)).compile()

        programs = [self.programs[k, "step"] for k in range(len(self.spec.modules))]
        compile_together(
            [
                partial(compile_module, k, program)
                for k, program in enumerate(programs)
                if hasattr(program, "lower")  # not a function that somebody has put there
            ]
        )

    def _count(self, report: Report) -> None:
        """Adds the bytes of the batches that a report shows to be finished to the meters."""
        waiting, below = [], set(range(report.module or 0))
        for batch, n, meter in self._counts:
            # A report of a single module, as under `layerwise`, is of its oldest unreported update,
            # whose batch was the oldest one on every hop below the module.
            if batch < report.step if report.module is None else n in below:
                self.meters[n].add(meter)
                below.discard(n)
            else:
                waiting.append((batch, n, meter))
        self._counts = waiting

    def _move(
        self, k: int, number: int, message: Message, context: Context | None
    ) -> tuple[Message, Any]:
        """Moves a message and its context to the devices of module k, which reads it.

        Also moves a codebook that was just published. Does nothing if sender and reader share their
        devices.
        """
        batch, meter = number, Meter()
        if context is None:  # messages from above carry no context
            if self.placement.crosses(k):
                codebook = self._publish(k, "above", number, message.codebook)
                parameters = self._publish(k, "parameters", number, message.published)
                meter.count_from_above((message.payload, parameters), codebook)
                self._counts.append((batch, k, meter))
                message = Message(
                    put(message.payload, self.placement.split(k)),
                    self.published[k, "above"],
                    published=self.published[k, "parameters"],
                )
            return message, context
        if not self.placement.crosses(k - 1):
            return message, context
        payload, context = put((message.payload, context), self.placement.split(k))
        if (sent := self._sent[k - 1]) is not None:
            number, self._sent[k - 1] = sent, sent + 1
        fresh = self._publish(k, "below", number, message.codebook)
        meter.count(payload, context, fresh)
        self._counts.append((batch, k - 1, meter))
        return Message(payload, self.published[k, "below"]), context

    def _publish(self, k: int, port: str, number: int, codebook: Any) -> Any:
        """Moves a codebook that was just published to module k; returns it, or None if it was not.

        Stores the newest codebook at the port in `published`.
        """
        fresh = self.publishers[k, port].fresh(codebook, number)
        if fresh is not None:
            fresh = self.published[k, port] = put(fresh, self.placement.replicated(k))
        self.published.setdefault((k, port), ())
        return fresh


def _drained(snapshot: Snapshot, ended: object, flight: bool = True) -> Drained:
    modules = snapshot(flight).modules
    return Drained(modules, ended=ended, drained=modules)


def _make(run: EngineInputs, options: SynchronousOptions) -> PipelineEngine:
    return PipelineEngine(
        run.spec, run.placed(options.group_sizes), options.ticks_in_flight, run.total_steps
    )


ENGINES.ship(pipeline=EngineKind(_make, SynchronousOptions, family="synchronous", distributed=True))
