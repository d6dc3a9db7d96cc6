"""Base class of the asynchronous engines, and the turn of a module that reads and fills rings."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.config.fields import SEVERAL, choice, option
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.advance import compile_together, turn_shapes
from dgl_jax.engines.base import EngineInputs, EngineState, Publisher, counts, place_modules
from dgl_jax.engines.feed import Feed, Residence
from dgl_jax.engines.flight import FrozenRings, Rings, ring_specs
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.program import jitted, jitted_feed
from dgl_jax.engines.transfer import put
from dgl_jax.errors import UserError
from dgl_jax.methods.post import Mail, closed, delivered, oldest, opened
from dgl_jax.replay import Ring, check_memory
from dgl_jax.replay.rules import limit_of
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Header, Inbox, Message

_LOG = logging.getLogger(__name__)


class Asynchronous:
    """Base class of asynchronous engines: a ring at each entrance, two programs per module.

    Attributes:
      unit: unit of the times of turns.
      recover: returns a module's state from the newest checkpoint; see `Engine`.
      residence: keeps the data set on the devices of the first module, if it fits.
      programs: update program of each module.
      feeds: forward-only program of each module but the last, for modules that have finished.
      state_programs: further programs to compile in advance, called with a module's state alone.
      codebooks: per module, the codebooks on its devices by their version in the ring that it
        reads.
      dispatch_seconds: seconds that the host has spent starting work of each module.
    """

    unit: str
    recover: Callable[[int], ModuleState | None] | None = None
    residence = Residence("off")

    def __init__(
        self,
        spec: TrainSpec,
        placement: Placement,
        engine: "AsynchronousOptions",
        replay: ReplaySettings,
    ):
        self.spec, self.placement, self.replay, self.hops = spec, placement, replay, spec.hops
        modules = range(len(spec.modules))
        self.programs = [jitted(spec, k, placement) for k in modules]
        self.feeds = [
            jitted_feed(spec, k, engine.finished == "train", placement) for k in modules[:-1]
        ]
        self.state_programs: list[Any] = []
        self._steps, self._feeding = tuple(self.programs), tuple(self.feeds)
        self._prepared = False
        self.codebooks: list[dict[int, Any]] = [{} for _ in modules]
        self.dispatch_seconds = [0.0 for _ in modules]

    @property
    def host_seconds(self) -> float:
        """Returns the seconds that the host has spent starting work, all modules together."""
        return sum(self.dispatch_seconds)

    def prepare(self) -> None:
        """Compiles all programs, modules in parallel; later calls do nothing.

        Compiling before the first turn keeps compilation out of measured times, and no module waits
        while another compiles.
        """
        if self._prepared:
            return

        def compile_module(k: int) -> None:
            state, inbox, context = turn_shapes(
                self.spec, self.placement, k, newest=self.spec.decode == "latest"
            )
            self._steps[k].lower(state, inbox, context).compile()
            if k < len(self._feeding):
                self._feeding[k].lower(state, inbox.below, context).compile()
            for program in self.state_programs:
                program.lower(state).compile()

        compile_together([partial(compile_module, k) for k in range(len(self._steps))])
        self._prepared = True

    def init(self) -> EngineState:
        """Returns fresh modules and empty rings."""
        return self.resume(self.place(EngineState(self.spec.init())), None)

    def place(self, state: EngineState) -> EngineState:
        """Moves the modules to the engine's devices; the flight stays in host memory."""
        return EngineState(place_modules(state.modules, self.placement, put).modules, state.flight)

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """Returns the state with the rings of the checkpoint.

        Without a snapshot the rings are empty and the count of turns starts at 0, so that the first
        turns fill the rings.
        """
        rings = Rings(self.spec, self.replay, batches=counts(state)[0], unit=self.unit)
        self.codebooks = [{} for _ in state.modules]
        if saved is not None:
            rings.restore(saved)
        return EngineState(state.modules, rings)

    def fetch(
        self, k: int, ring: Ring, message: Message, header: Header
    ) -> tuple[Message, Context]:
        """Moves a message that was read from the ring of module k to the module's devices.

        A codebook is moved when a message first needs it, and dropped once its version has left the
        ring.

        Args:
          k: index of the reading module.
          ring: the ring that was read.
          message: host arrays of the message.
          header: header of the message.

        Returns:
          The message and its context, on the devices of module k.
        """
        payload, context = put((message.payload, message.context), self.placement.split(k))
        if not header.codebook:
            return Message(payload), context
        newest, latest = ring.newest_codebook
        wanted = {header.codebook: message.codebook}
        if self.spec.decode == "latest":
            wanted[newest] = latest
        held_versions = ring.versions()
        on_devices = {
            version: codebook
            for version, codebook in self.codebooks[k].items()
            if version in held_versions
        }
        for version, codebook in wanted.items():
            if version not in on_devices:
                on_devices[version] = put(codebook, self.placement.replicated(k))
        self.codebooks[k] = on_devices
        codebook = on_devices[header.codebook]
        return Message(
            payload, codebook, on_devices[newest] if self.spec.decode == "latest" else None
        ), context

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Returns the statistics of the rings."""
        assert isinstance(state.flight, Rings | FrozenRings), (
            "this snapshot was taken without its rings"
        )
        return state.flight.gauges()


@dataclass(eq=False)
class RunningModule:
    """A module during a run of an asynchronous engine.

    Attributes:
      number: index k of the module.
      state: state without waiting messages; None during an update and after one that failed,
        because the program donates the state.
      updates: number of updates made so far.
      publisher: publisher of the hop above; None for the last module.
      mail: waiting messages from the module above, which replaces them.
      published: newest publication of parameters that was sent down, on the reader's devices.
    """

    number: int
    state: ModuleState | None
    updates: int
    publisher: Publisher | None
    mail: Mail = field(default_factory=dict)
    published: Any = None

    def __post_init__(self) -> None:
        if self.state is not None:
            self.state, self.mail = opened(self.state)

    def whole(self, state: ModuleState) -> ModuleState:
        """Returns a state of this module (or a copy) with the waiting messages."""
        return closed(state, self.mail)


class Intake(NamedTuple):
    """Inputs of a turn, on the devices of its module.

    Attributes:
      incoming: a Batch for the first module, a Message for the others.
      context: context of the examples.
      sequence: number of the batch that the examples come from.
    """

    incoming: Any
    context: Context
    sequence: int


class Outcome(NamedTuple):
    """Results of a turn.

    Attributes:
      metrics: metrics of the update, already computed; None if the module only fed the next one.
      above: host arrays and header of the message to the next module, with codebook None if its
        ring already has it; None for the last module.
      below: message to the module below, on its devices; None if there is none.
    """

    metrics: Metrics | None
    above: tuple[Message, Header] | None
    below: Message | None = None


class Turns:
    """Turns of modules in three phases: `take` inputs, `run` the program, `deliver` the results.

    The engine decides which module works when. It counts an update between `run` and `deliver`, so
    that no message is newer than the update count of its producer. If other threads read the
    module's state, the engine holds a lock around `run`.

    Args:
      engine: engine that owns the programs and moves messages to devices.
      rings: replay rings of the run.
      source: source of the first module's batches.
      until: number of updates after which a module only feeds the next one.
    """

    def __init__(self, engine: Asynchronous, rings: Rings, source: Source, until: int):
        self.rings, self.until = rings, until
        self._engine = engine
        self._feed = Feed(source, engine.placement, engine.residence)
        # Counts the batches taken; ahead of `rings.batches` while the first module works on one.
        self._taken = rings.batches

    @contextmanager
    def _dispatching(self, k: int) -> Iterator[None]:
        """Adds the duration of a `with` block to the time of starting work of module k."""
        begin = time.perf_counter()
        yield
        self._engine.dispatch_seconds[k] += time.perf_counter() - begin

    def finished(self, module: RunningModule) -> bool:
        """Returns True if the module has made all its updates and only feeds the next."""
        return module.updates >= self.until

    def take(self, k: int) -> Intake | None:
        """Reads the inputs of a turn of module k and moves them to the module's devices.

        Returns:
          The next batch (k = 0) or a message from the ring; None if the ring has no readable
          message.
        """
        if k == 0:
            with self._dispatching(k):
                batch = self._feed.batch(self._taken)
            self._taken += 1
            return Intake(batch, batch.context, self._taken - 1)
        sample = self.rings.sample(k)
        if sample is None:
            return None
        ring = self.rings.ring(k)
        with self._dispatching(k):
            incoming, context = self._engine.fetch(k, ring, sample.message, sample.header)
        return Intake(incoming, context, sample.header.sequence)

    def run(self, module: RunningModule, intake: Intake) -> Outcome:
        """Runs the module's program and copies its message for the next module to the host.

        The program updates the module, or only feeds the next one if the module has finished.
        Blocks until all results are computed, and leaves `module.updates` unchanged.
        """
        k, state, finished = module.number, module.state, self.finished(module)
        metrics: Metrics | None = None
        below: Message | None = None
        if finished:
            with self._dispatching(k):
                message = self._engine.feeds[k](state, intake.incoming, intake.context)
        else:
            # The program donates the state. It stays None until the update is complete, so that
            # nobody copies the state of a module whose step failed.
            module.state = None
            inbox = Inbox(intake.incoming, oldest(module.mail))
            with self._dispatching(k):
                state, (message, below), metrics = self._engine.programs[k](
                    state, inbox, intake.context
                )
                if below is not None:
                    below = self._sent_down(module, below)
        above = None
        if module.publisher is not None:
            codebook = module.publisher.fresh(
                message.codebook, None if finished else module.updates
            )
            context = self._engine.spec.carried(k + 1, intake.context, message.context)
            on_host = jax.device_get(Message(message.payload, codebook, context=context))
            above = on_host, Header(intake.sequence, module.updates + (not finished))
        jax.block_until_ready(metrics)
        module.state = state
        if k == 0:
            self.rings.batches = intake.sequence + 1
        return Outcome(metrics, above, below)

    def _sent_down(self, module: RunningModule, message: Message) -> Message:
        """Moves a message to the module below; parameters only if they are newly published."""
        k, known = module.number, module.published is not None
        publisher = Publisher(self._engine.hops[k - 1].refresh or 1, known)
        fresh = publisher.fresh(message.published, module.updates)
        message = message._replace(published=() if fresh is None else fresh)
        moved = put(message, self._engine.placement.message(k - 1))
        module.published = module.published if fresh is None else moved.published
        return moved._replace(published=module.published)

    def deliver(
        self, modules: Sequence[RunningModule], k: int, outcome: Outcome, begin: float, end: float
    ) -> None:
        """Sends the results of a turn of module k to its neighbors and records the turn.

        Args:
          modules: all modules of the run.
          k: index of the module that had the turn.
          outcome: results of the turn.
          begin: time at which the turn began, in the unit of the rings' turns.
          end: time at which the turn ended.
        """
        if outcome.above is not None:
            self.rings.add(k, *outcome.above)
        if outcome.below is not None:
            modules[k - 1].mail = delivered(modules[k - 1].mail, "above", outcome.below)
        self.rings.turns.append((k, begin, end))


def flight_of(state: EngineState) -> Rings:
    """Returns the rings of an asynchronous state."""
    assert isinstance(state.flight, Rings), "asynchronous states come from `init` or `resume`"
    return state.flight


@dataclass(frozen=True)
class AsynchronousOptions(EngineSettings):
    """Options of engines whose modules read messages from replay rings.

    Attributes:
      slowdown: factor of at least 1 per module, by which it gets fewer turns (`simulated`) or takes
        more time (`threads`); empty: no module is slowed down.
      finished: batch norm mode of a finished module, which only feeds the next one.
    """

    slowdown: tuple[float, ...] = option((), applies={"engine.order": ("random",)})
    finished: str = choice("train", "eval", applies=SEVERAL)

    def check(self, settings: Any) -> None:
        """Raises UserError if slowdowns are given but not one of at least 1 per module."""
        modules = settings.model.modules
        if self.slowdown and (len(self.slowdown) != modules or min(self.slowdown) < 1):
            raise UserError(
                f"config.engine.slowdown={self.slowdown}: needs one factor of at least 1 for each "
                f"of the {modules} modules"
            )


def check_rings(run: EngineInputs) -> None:
    """Logs the size of the rings.

    Raises:
      UserError: no message could be read from them, or they need more memory than is free.
    """
    limit_of(run.replay.rule, run.replay.size, run.replay.max_reuse)
    size, specs = run.replay.size, ring_specs(run.spec)
    sizes = ", ".join(f"{spec.nbytes(size) / 2**20:.1f}" for spec in specs)
    _LOG.info("replay rings of %d messages will take %s MiB of host memory", size, sizes)
    check_memory(specs, size)
