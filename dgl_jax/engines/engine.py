"""What an engine is, and the loop that the synchronous ones share."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import optax

from dgl_jax.codecs import Codec
from dgl_jax.data import Preprocess, Source
from dgl_jax.engines.turns import Tick, Turn, never
from dgl_jax.module import LocalModule, ModuleState, init_states, output_shape
from dgl_jax.packet import Targets, nbytes
from dgl_jax.placement import Placement
from dgl_jax.step import Metrics


@dataclass(frozen=True)
class Traffic:
    """Bytes an image takes across each hop (activations or their codes, label and id), one entry a hop.

    `measured` says that `wire` was counted from packets that crossed a device boundary; otherwise it was counted from the shapes
    of the encoded arrays.
    """

    raw: tuple[float, ...]
    wire: tuple[float, ...]
    measured: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is learnt and how, without a word on devices: all that the engines have in common.

    Attributes:
      modules: the cut network with its heads.
      optimizer: one for all; each module holds a state of its own.
      preprocess: makes network inputs of stored images.
      codec: what crosses between modules.
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

    def inputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of network inputs."""
        return jax.ShapeDtypeStruct((self.batch_size, *self.image_shape), "float32")

    def init(self) -> tuple[ModuleState, ...]:
        """Fresh states of all modules."""

        def states(key: jax.Array) -> tuple[ModuleState, ...]:
            return init_states(self.modules, self.optimizer, key, self.inputs())

        # A run-once program of many random draws: compiling it fast matters more (9 s against 3 on a CPU), the values are the same.
        options = {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else None
        return jax.jit(states, compiler_options=options)(jax.random.key(self.seed))

    def packets(self) -> tuple[tuple[jax.ShapeDtypeStruct, Any], ...]:
        """(activations, payload) of each hop, as shapes."""
        states = jax.eval_shape(lambda key: init_states(self.modules, self.optimizer, key, self.inputs()), jax.random.key(0))
        inputs, hops = self.inputs(), []
        for module, state in zip(self.modules[:-1], states):
            inputs = output_shape(module, state.params, state.batch_stats, inputs)
            hops.append((inputs, jax.eval_shape(self.codec.encode, inputs)))
        return tuple(hops)

    def traffic(self) -> Traffic:
        """What the packets would weigh, by the shapes of the encoded arrays."""
        integers: Any = jax.ShapeDtypeStruct((self.batch_size,), "int32")
        targets = nbytes(Targets(integers, integers))
        hops = self.packets()
        raw = tuple((nbytes(activations) + targets) / self.batch_size for activations, _ in hops)
        return Traffic(raw, tuple((nbytes(payload) + targets) / self.batch_size for _, payload in hops))


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


@dataclass
class Report:
    """What a synchronous engine says after an update of its last module, an asynchronous one after an update of any.

    Attributes:
      updates: updates made by each module.
      metrics: of each module for its newest update, empty where this report brings none: device scalars, already computed.
      snapshot: gives the EngineState. Of a synchronous engine only the last report of a run has one: before it, batches are in
        the pipe.
    """

    updates: tuple[int, ...]
    metrics: tuple[Metrics, ...]
    snapshot: Callable[[], EngineState]


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
    snapshot: Callable[[], EngineState],
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


def _in_flight() -> EngineState:
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
