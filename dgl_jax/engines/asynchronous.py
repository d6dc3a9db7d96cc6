"""What asynchronous engines share: the rings of packets between modules, and the turn of a module that reads and fills them."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.core import rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import EngineInputs, EngineState, Publisher, counts, place_modules
from dgl_jax.engines.placement import Placement, put
from dgl_jax.engines.program import jitted, jitted_feed
from dgl_jax.errors import UserError
from dgl_jax.fields import choice, option
from dgl_jax.replay import Ring, RingSpec, Sample, check_memory
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Context, Header, Message, Packet

_LOG = logging.getLogger(__name__)
_TURNS = 64  # the newest, kept for the timeline


class Rings:
    """The flight of an asynchronous state.

    Attributes:
      rings: those of modules 1, 2, ...
      batches: batches that the first module has read, up to its last whole turn.
      turn: turns drawn so far, where they are drawn.
      waiting: modules that had a turn but no packet to read, and take it as soon as there is one.
      skipped: of each module, turns lost for want of a packet.
      turns: the newest of all modules as (module, begin, end).
      unit: of begin and end: turns drawn, or seconds since the run began.
    """

    def __init__(self, spec: TrainSpec, replay: ReplaySettings, batches: int, unit: str):
        self.rings = [
            Ring(form.packet, replay.size, replay.rule, replay.max_reuse, rngs.ring(spec.seed, k), form.codebook)
            for k, form in enumerate(ring_forms(spec), 1)
        ]
        self.turn, self.batches, self.unit = 0, batches, unit
        modules = len(self.rings) + 1
        self.waiting, self.skipped = np.zeros(modules, np.int64), np.zeros(modules, np.int64)
        self.turns: deque[tuple[int, float, float]] = deque(maxlen=_TURNS)
        # How often module k read a packet of age 0, 1, 2 or 3, 4 to 7 and so on.
        self.ages = np.zeros((modules, (replay.size - 1).bit_length() + 1), np.int64)

    def ring(self, module: int) -> Ring:
        """The one that module reads."""
        return self.rings[module - 1]

    def sample(self, module: int) -> Sample | None:
        """What the module reads next; None where no packet may be read."""
        sample = self.ring(module).sample()
        if sample is not None:
            self.ages[module, sample.age.bit_length()] += 1
        return sample

    def add(self, producer: int, packet: Packet) -> None:
        """Copies a packet (host arrays; codebook None: the same as before) from one module to the ring of the next."""
        self.ring(producer + 1).add(packet.payload, packet.context, packet.header, packet.codebook)

    def gauges(self) -> dict[str, float]:
        """Of each ring: mean and largest age of the packets read, reads a packet, packets never read, bytes held, ages."""
        found: dict[str, float] = {}
        for k, ring in enumerate(self.rings, 1):
            tally = ring.tally
            values = {
                "age": tally.mean_age(),
                "oldest": tally.oldest,
                "reuse": tally.reuse(),
                "never_used": tally.never_used,
                "bytes": ring.nbytes,
                "skipped": self.skipped[k],
            }
            values |= {f"ages_from_{2**i // 2}": n for i, n in enumerate(self.ages[k])}
            found |= {f"replay/module_{k}/{name}": float(value) for name, value in values.items()}
        return found

    def recent(self) -> list[tuple[int, float, float]]:
        """The newest turns, oldest first."""
        return list(self.turns)

    def snapshot(self) -> dict[str, Any]:
        """Host arrays, copied."""
        rings = {f"ring_{k}": ring.snapshot() for k, ring in enumerate(self.rings, 1)}
        turns = np.array(self.recent(), np.float64).reshape(-1, 3)
        return rings | {
            "counts": np.array([self.turn, self.batches], np.int64),
            "waiting": self.waiting.copy(),
            "skipped": self.skipped.copy(),
            "ages": self.ages.copy(),
            "turns": np.concatenate([turns, np.full((_TURNS - len(turns), 3), -1.0)]),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from a snapshot."""
        self.turn, self.batches = (int(n) for n in np.asarray(saved["counts"]))
        self.waiting[:], self.skipped[:], self.ages[:] = saved["waiting"], saved["skipped"], saved["ages"]
        self.turns.extend((int(k), float(a), float(b)) for k, a, b in np.asarray(saved["turns"]) if k >= 0)
        for k, ring in enumerate(self.rings, 1):
            ring.restore(saved[f"ring_{k}"])


class Still:
    """The rings as they were when a snapshot was taken, for a checkpoint that is written while the workers go on.

    Each ring is copied under its lock. The rings are copied before the modules: no packet is newer than its producer.
    """

    def __init__(self, rings: Rings):
        self.unit, self._turns, self._gauges, self._saved = rings.unit, rings.recent(), rings.gauges(), rings.snapshot()

    def begin_at(self, batches: int) -> None:
        """Takes the count of batches that goes with the copy of the first module."""
        self._saved["counts"][1] = batches

    def gauges(self) -> dict[str, float]:
        """Returns those of the rings."""
        return self._gauges

    def recent(self) -> list[tuple[int, float, float]]:
        """Returns the newest turns, oldest first."""
        return self._turns

    def snapshot(self) -> dict[str, Any]:
        """Returns the copy itself."""
        return self._saved


class Asynchronous:
    """What asynchronous engines have in common: rings in flight, a program a module, and one that only feeds."""

    unit: str
    recover: Callable[[int], ModuleState | None] | None = None

    def __init__(self, spec: TrainSpec, placement: Placement, engine: "AsynchronousOptions", replay: ReplaySettings):
        self.spec, self.placement, self.replay, self.hops = spec, placement, replay, spec.hops
        modules = range(len(spec.modules))
        self.programs = [jitted(spec, k, placement) for k in modules]
        self.feeds = [jitted_feed(spec, k, engine.finished == "train", placement) for k in modules[:-1]]
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
                state = _shapes(states[k], self.placement.replicated(k))
                incoming, context = self._entering(k)
                self._steps[k].lower(state, incoming, context).compile()
                if k < len(self._feeding):
                    self._feeding[k].lower(state, incoming).compile()
                for program in self.of_states:
                    program.lower(state).compile()
            except Exception as error:
                failed.append(error)

        # Daemons: whoever quits at once does not wait for a compiler.
        compilers = [threading.Thread(target=compile_all, args=(k,), daemon=True) for k in range(len(states))]
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
            return Batch(_shapes(batch.inputs, split), context, _shapes(batch.step, everywhere)), context
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

    def fetch(self, k: int, ring: Ring, packet: Packet) -> tuple[Message, Context]:
        """A packet from the ring of module k to its devices; a codebook moves when it is first needed there."""
        payload, context = put((packet.payload, packet.context), self.placement.split(k))
        if not packet.header.codebook:
            return Message(payload), context
        newest, latest = ring.newest_codebook
        wanted = {packet.header.codebook: packet.codebook}
        if self.spec.decode == "latest":
            wanted[newest] = latest
        kept = ring.versions()
        here = {version: book for version, book in self.codebooks[k].items() if version in kept}
        for version, book in wanted.items():
            if version not in here:
                here[version] = put(book, self.placement.replicated(k))
        self.codebooks[k] = here
        codebook = here[packet.header.codebook]
        return Message(payload, codebook, here[newest] if self.spec.decode == "latest" else None), context

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
    """

    number: int
    state: ModuleState | None
    updates: int
    publisher: Publisher | None


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
      packet: host arrays for the next module, with codebook None if its ring has it; None for the last module.
    """

    metrics: Metrics | None
    packet: Packet | None


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
        incoming, context = self._engine.fetch(k, self.rings.ring(k), sample.packet)
        return Intake(incoming, context, sample.packet.header.sequence)

    def run(self, module: RunningModule, intake: Intake) -> Outcome:
        """Updates the module (or only feeds, once it is finished), and copies what goes to the next one to the host.

        Waits until all is computed. Leaves `module.updates` as it is.
        """
        k, state, done = module.number, module.state, self.finished(module)
        metrics: Metrics | None = None
        if done:
            coded = self._engine.feeds[k](state, intake.incoming)
        else:
            # Donated, and there again once the update is whole: a step that fails leaves nothing that could be copied.
            module.state = None
            state, coded, metrics = self._engine.programs[k](state, intake.incoming, intake.context)
        packet = None
        if module.publisher is not None:
            fresh = module.publisher.fresh(coded.codebook, None if done else module.updates)
            payload, context, codebook = jax.device_get(
                (coded.payload, self._engine.spec.carried(k + 1, intake.context, coded.context), fresh)
            )
            packet = Packet(payload, context, Header(intake.sequence, module.updates + (not done)), codebook)
        jax.block_until_ready(metrics)
        module.state = state
        if k == 0:
            self.rings.batches = intake.sequence + 1
        return Outcome(metrics, packet)

    def hand_on(self, k: int, packet: Packet | None, begin: float, end: float) -> None:
        """Adds a packet to the ring of the next module and notes the turn of module k, which lasted from `begin` to `end`."""
        if packet is not None:
            self.rings.add(k, packet)
        self.rings.turns.append((k, begin, end))


def flight_of(state: EngineState) -> Rings:
    """The rings of an asynchronous state."""
    assert isinstance(state.flight, Rings), "an asynchronous engine begins with `init` or `resume`"
    return state.flight


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def ring_forms(spec: TrainSpec) -> list[RingSpec]:
    """What each ring holds."""
    return [RingSpec((hop.payload, spec.context(k)), hop.codebook, hop.period) for k, hop in enumerate(spec.hops, 1)]


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
            raise UserError(f"config.engine.slowdown={self.slowdown}: one factor of at least 1 for each of {modules} modules")


def check_rings(run: EngineInputs) -> None:
    """Raises UserError if the rings take more memory than is free; logs what they will take."""
    size, forms = run.replay.size, ring_forms(run.spec)
    sizes = ", ".join(f"{form.nbytes(size) / 2**20:.1f}" for form in forms)
    _LOG.info("rings of %d packets will take %s MiB of host memory", size, sizes)
    check_memory(forms, size)
