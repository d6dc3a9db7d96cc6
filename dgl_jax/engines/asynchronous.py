"""What asynchronous engines share: the turn of a module that reads and fills the rings of packets between modules."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import EngineInputs, EngineState, Publisher, counts, place_modules
from dgl_jax.engines.flight import Rings, Still, ring_specs
from dgl_jax.engines.placement import Placement, put
from dgl_jax.engines.program import jitted, jitted_feed
from dgl_jax.errors import UserError
from dgl_jax.fields import choice, option
from dgl_jax.methods.base import Mail, closed, delivered, oldest, opened
from dgl_jax.replay import Ring, check_memory
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Context, Header, Inbox, Message

_LOG = logging.getLogger(__name__)


class Asynchronous:
    """What asynchronous engines have in common: rings in flight, a program a module, and one that only feeds."""

    unit: str
    recover: Callable[[int], ModuleState | None] | None = None

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
        self.of_states: list[Any] = []  # further programs, of a module's state alone
        self._steps, self._feeding = tuple(self.programs), tuple(self.feeds)
        self._prepared = False
        # The codebooks that module k has on its devices, by their version in the ring it reads.
        self.codebooks: list[dict[int, Any]] = [{} for _ in modules]

    def prepare(self) -> None:
        """Compiles all programs, those of different modules at once; a second call does nothing.

        Compiled before the first turn they can be in no measured time, and no module waits for another one's compiler.
        """
        if self._prepared:
            return
        states, failed = self.spec.abstract_states(), []

        def compile_all(k: int) -> None:
            try:
                state, mail = opened(_shapes(states[k], self.placement.replicated(k)))
                incoming, context = self._entering(k)
                self._steps[k].lower(state, Inbox(incoming, oldest(mail)), context).compile()
                if k < len(self._feeding):
                    self._feeding[k].lower(state, incoming, context).compile()
                for program in self.of_states:
                    program.lower(state).compile()
            except Exception as error:
                failed.append(error)

        # Daemons: whoever quits at once does not wait for a compiler.
        compilers = [
            threading.Thread(target=compile_all, args=(k,), daemon=True) for k in range(len(states))
        ]
        for compiler in compilers:
            compiler.start()
        for compiler in compilers:
            compiler.join()
        if failed:
            raise failed[0]
        self._prepared = True

    def _entering(self, k: int) -> tuple[Any, Context]:
        """Returns shapes of what a turn of module k takes in, where it will lie."""
        split, everywhere = self.placement.split(k), self.placement.replicated(k)
        context: Any = _shapes(self.spec.context(k), split)
        if k == 0:
            batch = self.spec.batch()
            return Batch(
                _shapes(batch.inputs, split), context, _shapes(batch.step, everywhere)
            ), context
        hop = self.hops[k - 1]
        book = _shapes(hop.codebook, everywhere)
        newest = book if hop.period and self.spec.decode == "latest" else None
        return Message(_shapes(hop.payload, split), book, newest), context

    def init(self) -> EngineState:
        """Fresh modules, empty rings."""
        return self.resume(self.place(EngineState(self.spec.init())), None)

    def place(self, state: EngineState) -> EngineState:
        """The modules on this engine's devices; the flight as it is."""
        return EngineState(place_modules(state.modules, self.placement, put).modules, state.flight)

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """With the rings of the checkpoint; without a snapshot they are empty, and turns begin anew, which fills them."""
        rings = Rings(self.spec, self.replay, batches=counts(state)[0], unit=self.unit)
        self.codebooks = [{} for _ in state.modules]
        if saved is not None:
            rings.restore(saved)
        return EngineState(state.modules, rings)

    def fetch(
        self, k: int, ring: Ring, message: Message, header: Header
    ) -> tuple[Message, Context]:
        """Moves what was read from the ring of module k to its devices; a codebook moves when it is first needed there."""
        payload, context = put((message.payload, message.context), self.placement.split(k))
        if not header.codebook:
            return Message(payload), context
        newest, latest = ring.newest_codebook
        wanted = {header.codebook: message.codebook}
        if self.spec.decode == "latest":
            wanted[newest] = latest
        kept = ring.versions()
        here = {version: book for version, book in self.codebooks[k].items() if version in kept}
        for version, book in wanted.items():
            if version not in here:
                here[version] = put(book, self.placement.replicated(k))
        self.codebooks[k] = here
        codebook = here[header.codebook]
        return Message(
            payload, codebook, here[newest] if self.spec.decode == "latest" else None
        ), context

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Those of the rings."""
        assert isinstance(state.flight, Rings | Still), "a snapshot without its flight has none"
        return state.flight.gauges()


@dataclass(eq=False)
class RunningModule:
    """A module during a run.

    Attributes:
      number: k.
      state: None while an update is under way and after one that failed: the program takes the state over (donates it).
      updates: made so far.
      publisher: of what the module hands on; None for the last one.
      mail: what waits from the module above, which replaces it.
    """

    number: int
    state: ModuleState | None
    updates: int
    publisher: Publisher | None
    mail: Mail = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state is not None:
            self.state, self.mail = opened(self.state)

    def whole(self, state: ModuleState) -> ModuleState:
        """Returns a state of the module, or a copy of it, with the messages that wait."""
        return closed(state, self.mail)


class Intake(NamedTuple):
    """What a turn reads, on the devices of its module.

    Attributes:
      incoming: a Batch for the first module, a Message for the others.
      context: of its examples.
      sequence: number of the batch that it comes from.
    """

    incoming: Any
    context: Context
    sequence: int


class Outcome(NamedTuple):
    """What a turn made.

    Attributes:
      metrics: of the update, already computed; None if the module only fed the next one.
      above: host arrays for the next module, with their header, and codebook None if its ring has it; None for the last module.
      below: a message for the module below, on its devices; None if there is none.
    """

    metrics: Metrics | None
    above: tuple[Message, Header] | None
    below: Message | None = None


class Turns:
    """The turn of a module in three phases: `take` what it reads, `run` its program, `hand_on` what it made.

    The engine decides who works when. It counts the update between `run` and `hand_on`, so that no packet is newer than the
    count of its producer, and if other threads look at the module, it holds a lock over `run`.

    Args:
      engine: has the programs, and moves packets to devices.
      rings: of the run.
      source: of the first module's batches.
      until: updates after which a module only feeds the next one.
    """

    def __init__(self, engine: Asynchronous, rings: Rings, source: Source, until: int):
        self.rings, self.until = rings, until
        self._engine = engine
        self._batches = source.batches(rings.batches)
        self._taken = rings.batches  # ahead of `rings.batches` while a batch is worked on

    def finished(self, module: RunningModule) -> bool:
        """Returns whether the module has made all its updates and only feeds the next one."""
        return module.updates >= self.until

    def take(self, k: int) -> Intake | None:
        """Reads the next batch (k = 0) or a packet and moves it to the devices of module k; None if no packet may be read."""
        if k == 0:
            batch = self._engine.placement.put_batch(next(self._batches), 0)
            self._taken += 1
            return Intake(batch, batch.context, self._taken - 1)
        sample = self.rings.sample(k)
        if sample is None:
            return None
        incoming, context = self._engine.fetch(k, self.rings.ring(k), sample.message, sample.header)
        return Intake(incoming, context, sample.header.sequence)

    def run(self, module: RunningModule, intake: Intake) -> Outcome:
        """Updates the module (or only feeds, once it is finished), and copies what goes to the next one to the host.

        Waits until all is computed. Leaves `module.updates` as it is.
        """
        k, state, done = module.number, module.state, self.finished(module)
        metrics: Metrics | None = None
        below: Message | None = None
        if done:
            message = self._engine.feeds[k](state, intake.incoming, intake.context)
        else:
            # Donated, and there again once the update is whole: a step that fails leaves nothing that could be copied.
            module.state = None
            inbox = Inbox(intake.incoming, oldest(module.mail))
            state, (message, below), metrics = self._engine.programs[k](
                state, inbox, intake.context
            )
            if below is not None:
                below = put(below, self._engine.placement.message(k - 1))
        above = None
        if module.publisher is not None:
            fresh = module.publisher.fresh(message.codebook, None if done else module.updates)
            context = self._engine.spec.carried(k + 1, intake.context, message.context)
            found = jax.device_get(Message(message.payload, fresh, context=context))
            above = found, Header(intake.sequence, module.updates + (not done))
        jax.block_until_ready(metrics)
        module.state = state
        if k == 0:
            self.rings.batches = intake.sequence + 1
        return Outcome(metrics, above, below)

    def hand_on(
        self, modules: Sequence[RunningModule], k: int, made: Outcome, begin: float, end: float
    ) -> None:
        """Sends what module k made to its neighbours and notes its turn, which lasted from `begin` to `end`."""
        if made.above is not None:
            self.rings.add(k, *made.above)
        if made.below is not None:
            modules[k - 1].mail = delivered(modules[k - 1].mail, "above", made.below)
        self.rings.turns.append((k, begin, end))


def flight_of(state: EngineState) -> Rings:
    """The rings of an asynchronous state."""
    assert isinstance(state.flight, Rings), "an asynchronous engine begins with `init` or `resume`"
    return state.flight


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


@dataclass(frozen=True)
class AsynchronousOptions(EngineSettings):
    """Of engines whose modules read packets from rings."""

    # Of each module, at least 1: its share of the turns, or its time.
    slowdown: tuple[float, ...] = option((), applies={"engine.order": ("random",)})
    finished: str = choice("train", "eval")  # batch norm of a module that is done and only feeds

    def check(self, settings: Any) -> None:
        """Raises UserError if there is not one factor of at least 1 for each module."""
        modules = settings.model.modules
        if self.slowdown and (len(self.slowdown) != modules or min(self.slowdown) < 1):
            raise UserError(
                f"config.engine.slowdown={self.slowdown}: one factor of at least 1 for each of {modules} modules"
            )


def check_rings(run: EngineInputs) -> None:
    """Raises UserError if the rings take more memory than is free; logs what they will take."""
    size, forms = run.replay.size, ring_specs(run.spec)
    sizes = ", ".join(f"{form.nbytes(size) / 2**20:.1f}" for form in forms)
    _LOG.info("rings of %d packets will take %s MiB of host memory", size, sizes)
    check_memory(forms, size)
