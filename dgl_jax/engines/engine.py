"""What an engine is, and the loop that the synchronous ones share."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import jax
import optax

from dgl_jax import average, rngs
from dgl_jax.codecs import Codec
from dgl_jax.data import Preprocess, Source
from dgl_jax.engines.turns import Tick, Turn, never
from dgl_jax.kept import kept
from dgl_jax.module import LocalModule, ModuleState, init_states, output_shape
from dgl_jax.packet import Targets, nbytes
from dgl_jax.placement import Placement
from dgl_jax.step import Metrics


@dataclass(frozen=True)
class Traffic:
    """Bytes an image takes across each hop (activations or their codes, label and id), one entry a hop.

    Attributes:
      raw: without a codec.
      wire: with it, codebooks included.
      codebook: what of `wire` codebooks take.
      measured: `wire` was counted from packets that crossed a device boundary; otherwise from the shapes of the encoded arrays.
    """

    raw: tuple[float, ...]
    wire: tuple[float, ...]
    codebook: tuple[float, ...]
    measured: bool = False

    def gauges(self) -> dict[str, float]:
        """As metrics of the modules that send."""
        found = {}
        for k, (raw, wire, codebook) in enumerate(zip(self.raw, self.wire, self.codebook, strict=True)):
            found[f"wire/module_{k}/bytes_per_image"] = wire
            found[f"wire/module_{k}/compression"] = raw / wire
            found[f"wire/module_{k}/codebook_share"] = codebook / wire
        return found


@dataclass
class Meter:
    """Counts what crosses a hop."""

    packets: int = 0  # bytes of payloads and targets
    codebooks: int = 0  # bytes
    images: int = 0

    def count(self, payload: Any, targets: Targets, codebook: Any = ()) -> None:
        """One packet, and the codebook that went with it, if one did."""
        self.packets += nbytes((payload, targets))
        self.codebooks += nbytes(codebook)
        self.images += len(targets.label)


class Hop(NamedTuple):
    """What crosses from a module to the next, as shapes and dtypes.

    Attributes:
      period: updates from one codebook to the next; 0: the codec has none.
    """

    activations: jax.ShapeDtypeStruct
    payload: Any
    codebook: Any
    period: int

    def publishes(self, updates: int) -> bool:
        """Whether the packet of the update after so many comes with a new codebook."""
        return bool(self.period) and updates % self.period == 0


@dataclass(frozen=True)
class Recipe:
    """What is learnt and how, without a word on devices: all that the engines have in common.

    Attributes:
      modules: the cut network with its heads.
      optimizer: one for all; each module holds a state of its own.
      preprocess: makes network inputs of stored images.
      codec: what crosses between modules.
      decode: sent or latest: the codebook that decodes a packet which has waited in a ring.
      accumulate: micro-batches that a batch is split into.
      label_smoothing: of the training loss.
      ema: decay of the moving average of parameters that is evaluated; 0: none is kept.
      seed: of the parameters and of the augmentation.
      batch_size: examples of the whole batch, over all devices.
      image_shape: (height, width, channels) of a stored image.
    """

    modules: tuple[LocalModule, ...]
    optimizer: optax.GradientTransformation
    preprocess: Preprocess
    codec: Codec
    seed: int
    batch_size: int
    image_shape: tuple[int, int, int]
    decode: str = "sent"
    accumulate: int = 1
    label_smoothing: float = 0.0
    ema: float = 0.0

    def inputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of network inputs."""
        return jax.ShapeDtypeStruct((self.batch_size, *self.image_shape), "float32")

    def init(self) -> tuple[ModuleState, ...]:
        """Fresh states of all modules."""
        return _init_program(self)(rngs.root(self.seed))

    def abstract_states(self) -> tuple[ModuleState, ...]:
        """Shapes and dtypes of what `init` gives."""
        return jax.eval_shape(_init_program(self), rngs.root(0))

    def _states(self, key: jax.Array) -> tuple[ModuleState, ...]:
        states = list(init_states(self.modules, self.optimizer, key, self.inputs()))
        for k, activations in enumerate(self._activations(states)):
            of_codec = self.codec.init(activations)
            if jax.tree.leaves(of_codec):
                states[k] = dataclasses.replace(states[k], extras={"codec": of_codec})
        return tuple(map(average.begin, states)) if self.ema else tuple(states)

    def _activations(self, states: Sequence[ModuleState]) -> Iterator[jax.ShapeDtypeStruct]:
        inputs = self.inputs()
        for module, state in zip(self.modules[:-1], states):
            inputs = output_shape(module, state.params, state.batch_stats, inputs)
            yield inputs

    def codebook(self, state: ModuleState) -> Any:
        """What decodes the packets that a module hands on; `()` where the codec has no codebook, or nothing is handed on."""
        return self.codec.codebook(state.extras["codec"]) if "codec" in state.extras else ()

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """What crosses from each module to the next."""
        states, hops = self.abstract_states(), []
        for state, activations in zip(states, self._activations(states)):
            codebook = jax.eval_shape(self.codebook, state)
            payload = jax.eval_shape(self.codec.encode, codebook, activations)
            hops.append(Hop(activations, payload, codebook, self.codec.period(activations)))
        return tuple(hops)

    def targets(self) -> Targets:
        """Shapes and dtypes of a batch's targets."""
        integers: Any = jax.ShapeDtypeStruct((self.batch_size,), "int32")
        return Targets(integers, integers)

    def traffic(self, meters: Sequence[Meter] = ()) -> Traffic:
        """What the packets weigh: counted where a meter has counted, else by the shapes of the encoded arrays."""
        targets, size = nbytes(self.targets()), self.batch_size
        raw, packets, codebooks = [], [], []
        for hop in self.hops:
            raw.append((nbytes(hop.activations) + targets) / size)
            packets.append((nbytes(hop.payload) + targets) / size)
            codebooks.append(nbytes(hop.codebook) / hop.period / size if hop.period else 0.0)
        counted = [k for k, meter in enumerate(meters) if meter.images]
        for k in counted:
            packets[k], codebooks[k] = (n / meters[k].images for n in (meters[k].packets, meters[k].codebooks))
        wire = tuple(p + c for p, c in zip(packets, codebooks))
        return Traffic(tuple(raw), wire, tuple(codebooks), bool(counted))


@kept(8)
def _init_program(recipe: Recipe) -> Callable[[jax.Array], tuple[ModuleState, ...]]:
    """Returns the jitted function that makes the states."""
    # A run-once program of many random draws: compiling it fast matters more (9 s against 3 on a CPU), the values are the same.
    options = {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else None
    return jax.jit(recipe._states, compiler_options=options)


class Flight(Protocol):
    """What is under way between modules where that belongs to the algorithm: rings, turns. Lives on the host, changes in place.

    Attributes:
      unit: of the times in `recent`.
    """

    unit: str

    def snapshot(self) -> Any:
        """A pytree of host arrays, copied, for a checkpoint."""

    def recent(self) -> list[tuple[int, float, float]]:
        """The newest turns as (module, begin, end), oldest first."""


@dataclass(frozen=True)
class EngineState:
    """The states of all modules: one checkpoint form for every engine and device layout; `flight` is None in synchronous ones."""

    modules: tuple[ModuleState, ...]
    flight: Flight | None = None


class Snapshot(Protocol):
    """Gives the state of an engine."""

    def __call__(self, flight: bool = True) -> EngineState:
        """Returns the modules' states and, unless `flight` is false, what is under way: an evaluation has no use for that."""


@dataclass
class Report:
    """What a synchronous engine says after an update of its last module, an asynchronous one after an update of any.

    Attributes:
      updates: updates made by each module.
      metrics: of each module for its newest update, empty where this report brings none: device scalars, already computed.
      snapshot: gives the EngineState. Of a synchronous engine only the last report of a run has one: before it, batches are in
        the pipe.
      at: seconds of a monotonic clock at which the update was done, if reports may be read later than they are made.
    """

    updates: tuple[int, ...]
    metrics: tuple[Metrics, ...]
    snapshot: Snapshot
    at: float | None = None


class Engine(Protocol):
    """Decides which module works when, and where.

    Attributes:
      continuous: its modules go on while its reports are read, so that one `run` lasts until the end of training, whatever is done
        with snapshots in between.
    """

    recipe: Recipe
    placement: Placement
    continuous: bool

    def traffic(self) -> Traffic:
        """What the packets weigh."""

    def init(self) -> EngineState:
        """Fresh state on its devices."""

    def place(self, state: EngineState) -> EngineState:
        """A state (restored, or another engine's) on this engine's devices."""

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """A restored state with its flight, from the snapshot in the checkpoint (None: it has none)."""

    def gauges(self, state: EngineState) -> dict[str, float]:
        """What the engine measures of itself, for the metrics."""

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; takes over (donates) `state`.

        Once `stop()` is true no new batch is begun; a synchronous run ends with all modules at the same count.
        """


class Synchronous:
    """What synchronous engines have in common: nothing is under way when they rest."""

    continuous = False

    def resume(self, state: EngineState, saved: Any) -> EngineState:
        """The state itself."""
        return state

    def gauges(self, state: EngineState) -> dict[str, float]:
        """None."""
        return {}


def run_ticks(
    ticks: Iterator[Tick],
    dispatch: Callable[[Tick], list[tuple[Turn, Metrics]]],
    in_flight: int,
    modules: int,
    snapshot: Snapshot,
) -> Iterator[Report]:
    """Dispatches ticks without waiting for their results, at most `in_flight` ahead, and reports each finished batch.

    A report comes once all modules have trained on its batch and their metrics are computed, so reading them never stalls the
    devices. The last report alone can give a snapshot.
    """
    waiting: deque[list[tuple[Turn, Metrics]]] = deque()
    collected: dict[int, list[Metrics]] = {}
    late: Report | None = None

    def finished(results: list[tuple[Turn, Metrics]]) -> Iterator[Report]:
        jax.block_until_ready([metrics for _, metrics in results])
        # The first module comes first in every batch's list: it works on a batch before, or is listed before, all others.
        for turn, metrics in sorted(results, key=lambda result: result[0]):
            collected.setdefault(turn.batch, []).append(metrics)
        for batch in sorted(b for b, found in collected.items() if len(found) == modules):
            yield Report((batch + 1,) * modules, tuple(collected.pop(batch)), _in_flight)

    def reports() -> Iterator[Report]:
        for tick in ticks:
            # The guard is on inside a tick only: a generator must not leave it on in its caller.
            with jax.transfer_guard("disallow"):
                waiting.append(dispatch(tick))
            while len(waiting) > in_flight:
                yield from finished(waiting.popleft())
        while waiting:
            yield from finished(waiting.popleft())

    for report in reports():
        if late is not None:
            yield late
        late = report
    if late is not None:
        late.snapshot = snapshot
        yield late


def _in_flight(flight: bool = True) -> EngineState:
    raise RuntimeError("batches are in the pipe: only the last report of a run gives a snapshot")


def counts(state: EngineState) -> list[int]:
    """The updates of each module."""
    return [int(jax.device_get(module.updates)) for module in state.modules]


def updates_of(state: EngineState) -> int:
    """The update count that all modules of a synchronous state share."""
    found = set(counts(state))
    if len(found) != 1:
        raise ValueError(f"modules of a synchronous run have unequal update counts: {sorted(found)}")
    return found.pop()


def place_modules(states: Sequence[ModuleState], placement: Placement, put: Callable[[Any, Any], Any]) -> EngineState:
    """Each module's state, whole, on every device of its group."""
    return EngineState(tuple(put(state, placement.replicated(k)) for k, state in enumerate(states)))
