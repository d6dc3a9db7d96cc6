"""What is trained, and how: all that engines share, without a word on devices; and what crosses between modules."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import optax

from dgl_jax.codecs import Codec
from dgl_jax.core import ema, rngs
from dgl_jax.core.kept import kept
from dgl_jax.core.module import LocalModule, ModuleState, init_states, output_shape
from dgl_jax.tasks import Task
from dgl_jax.types import Batch, Context, nbytes


@dataclass(frozen=True)
class Traffic:
    """Bytes an image takes across each hop, up (activations or their codes, and context) and down, one entry a hop.

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
        for k, (raw, wire, codebook) in enumerate(
            zip(self.raw, self.wire, self.codebook, strict=True)
        ):
            found[f"wire/module_{k}/bytes_per_image"] = wire
            found[f"wire/module_{k}/compression"] = raw / wire
            found[f"wire/module_{k}/codebook_share"] = codebook / wire
        return found


@dataclass
class Meter:
    """Counts what crosses a hop."""

    packets: int = 0  # bytes of payloads and their context
    codebooks: int = 0  # bytes
    images: int = 0

    def count(self, payload: Any, context: Context, codebook: Any = ()) -> None:
        """Counts one packet, and the codebook that went with it, if one did."""
        self.packets += nbytes((payload, context))
        self.codebooks += nbytes(codebook)
        self.images += len(context["id"])

    def came_down(self, message: Any) -> None:
        """Counts a message from the module above."""
        self.packets += nbytes(message)


class MessageSpec(NamedTuple):
    """What crosses from a module to the next, as shapes and dtypes.

    Attributes:
      period: updates from one codebook to the next; 0: the codec has none.
      down: what the next module sends back for each batch.
    """

    activations: jax.ShapeDtypeStruct
    payload: Any
    codebook: Any
    period: int
    down: Any = ()

    def publishes(self, updates: int) -> bool:
        """Whether the packet of the update after so many comes with a new codebook."""
        return bool(self.period) and updates % self.period == 0


@dataclass(frozen=True)
class TrainSpec:
    """What is learnt and how, without a word on devices: all that the engines have in common.

    Attributes:
      modules: the cut network with its heads.
      method: the training rule.
      optimizer: one for all; each module holds a state of its own.
      task: what the examples are; makes network inputs of stored ones.
      codec: what crosses between modules.
      decode: sent or latest: the codebook that decodes a packet which has waited in a ring.
      accumulate: micro-batches that a batch is split into.
      ema: decay of the moving average of parameters that is evaluated; 0: none is kept.
      seed: of the parameters and of the augmentation.
      batch_size: examples of the whole batch, over all devices.
    """

    modules: tuple[LocalModule, ...]
    method: Any  # a `methods.Method`, which this file comes before
    optimizer: optax.GradientTransformation
    task: Task
    codec: Codec
    seed: int
    batch_size: int
    decode: str = "sent"
    accumulate: int = 1
    ema: float = 0.0

    def inputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of network inputs."""
        return self.task.inputs(self.batch_size)

    def batch(self) -> Batch:
        """Returns shapes and dtypes of a batch of the source."""
        example: Any = self.task.example
        stored: Any = jax.ShapeDtypeStruct((self.batch_size, *example.shape), example.dtype)
        return Batch(stored, self.context(0), jax.ShapeDtypeStruct((), "int32"))  # type: ignore[arg-type]

    def init(self) -> tuple[ModuleState, ...]:
        """Fresh states of all modules."""
        return _init_program(self)(rngs.root(self.seed))

    def abstract_states(self) -> tuple[ModuleState, ...]:
        """Shapes and dtypes of what `init` gives."""
        return jax.eval_shape(_init_program(self), rngs.root(0))

    def _states(self, key: jax.Array) -> tuple[ModuleState, ...]:
        context = {"image": self.inputs(), **self.context(0)}
        states = list(init_states(self.modules, self.optimizer, key, self.inputs(), context))
        for k, activations in enumerate(self.shapes(states)[1:]):
            of_codec = self.codec.init(activations)
            if jax.tree.leaves(of_codec):
                states[k] = dataclasses.replace(states[k], extras={"codec": of_codec})
        for k, state in enumerate(states):
            states[k] = dataclasses.replace(
                state, extras=state.extras | self.method.extras(self, k, states)
            )
        return tuple(map(ema.begin, states)) if self.ema else tuple(states)

    def shapes(self, states: Sequence[ModuleState]) -> list[jax.ShapeDtypeStruct]:
        """Returns shape and dtype of a batch of what each module reads, after decoding; `states` may be shapes too."""
        found = [self.inputs()]
        for module, state in zip(self.modules[:-1], states):
            found.append(output_shape(module, state.params, state.batch_stats, found[-1]))
        return found

    def codebook(self, state: ModuleState) -> Any:
        """What decodes the packets that a module hands on; `()` where the codec has no codebook, or nothing is handed on."""
        return self.codec.codebook(state.extras["codec"]) if "codec" in state.extras else ()

    @cached_property
    def hops(self) -> tuple[MessageSpec, ...]:
        """What crosses from each module to the next."""
        states, hops = self.abstract_states(), []
        for state, activations in zip(states, self.shapes(states)[1:]):
            codebook = jax.eval_shape(self.codebook, state)
            payload = jax.eval_shape(self.codec.encode, codebook, activations)
            down = state.extras.get("above", ((),))[0]
            hops.append(
                MessageSpec(activations, payload, codebook, self.codec.period(activations), down)
            )
        return tuple(hops)

    def needs(self, k: int, answering: bool = False) -> tuple[str, ...]:
        """Returns the names of the context that reaches module k: what its objective, its adapter and those above read, and `id`.

        Args:
          answering: of an evaluation, in which objectives read nothing and nobody looks at an `id`.
        """
        return self._needs[answering][k]

    @cached_property
    def _needs(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        def of(k: int, answering: bool) -> tuple[str, ...]:
            readers: list[Any] = [
                part
                for m in self.modules[k:]
                for part in (m.adapter, None if answering else m.objective)
            ]
            named = {name for reader in readers if reader is not None for name in reader.needs}
            return tuple(sorted(named if answering else {"id", *named}))

        places = range(len(self.modules) + 1)
        return [of(k, False) for k in places], [of(k, True) for k in places]

    def reads(self, k: int) -> tuple[str, ...]:
        """Returns the names of the publications that the objective of module k reads; none without a module above it."""
        objective = self.modules[k].objective if 0 <= k < len(self.modules) - 1 else None
        return () if objective is None else objective.reads

    def carried(self, k: int, context: Context, added: Context | None = None) -> Context:
        """Returns what of a module's context, and of what it has added, goes on to module k."""
        whole = context | dict(added or {})
        return {name: whole[name] for name in self.needs(k)}

    def context(self, k: int) -> Any:
        """Returns shapes and dtypes of the context that reaches module k; to the first comes what the source yields."""
        shapes = {"id": (self.batch_size,), "label": (self.batch_size, *self.task.label)}
        known = {name: jax.ShapeDtypeStruct(shape, "int32") for name, shape in shapes.items()}
        if k:
            known["image"] = self.inputs()
            known = {name: known[name] for name in self.needs(k)}
        return known

    def traffic(self, meters: Sequence[Meter] = ()) -> Traffic:
        """What the packets weigh: counted where a meter has counted, else by the shapes of the encoded arrays."""
        if not self.method.sends:
            return Traffic((), (), ())
        size = self.batch_size
        raw, packets, codebooks = [], [], []
        for k, hop in enumerate(self.hops, 1):
            beside = nbytes((self.context(k), hop.down))
            raw.append((nbytes(hop.activations) + beside) / size)
            packets.append((nbytes(hop.payload) + beside) / size)
            codebooks.append(nbytes(hop.codebook) / hop.period / size if hop.period else 0.0)
        counted = [k for k, meter in enumerate(meters) if meter.images]
        for k in counted:
            packets[k], codebooks[k] = (
                n / meters[k].images for n in (meters[k].packets, meters[k].codebooks)
            )
        wire = tuple(p + c for p, c in zip(packets, codebooks))
        return Traffic(tuple(raw), wire, tuple(codebooks), bool(counted))


@kept(8)
def _init_program(spec: TrainSpec) -> Callable[[jax.Array], tuple[ModuleState, ...]]:
    """Returns the jitted function that makes the states."""
    # A run-once program of many random draws: compiling it fast matters more (9 s against 3 on a CPU), the values are the same.
    options = {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else None
    return jax.jit(spec._states, compiler_options=options)
