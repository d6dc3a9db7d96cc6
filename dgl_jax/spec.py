"""Device-independent description of a training run, and of the messages between its modules."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import optax

from dgl_jax.codecs import Codec
from dgl_jax.core import ema, rngs
from dgl_jax.core.drawing import DrawnFirst
from dgl_jax.core.module import LocalModule, ModuleState, init_states, output_shape
from dgl_jax.core.program_cache import cached_program
from dgl_jax.tasks import Task
from dgl_jax.types import Batch, Context, Message, nbytes


@dataclass(frozen=True)
class Traffic:
    """Bytes per image that cross each hop, in both directions together; one entry per hop.

    Upward these are activations (or their codes) and the context, downward gradients or
    publications.

    Attributes:
      raw: bytes without a codec.
      wire: bytes with the codec, including codebooks.
      codebook: the part of `wire` that is codebooks.
      measured: True if `wire` was counted from messages that crossed a device boundary, False if it
        was computed from the shapes of the encoded arrays.
      down: the part of `wire` that travels down; empty if nothing does.
    """

    raw: tuple[float, ...]
    wire: tuple[float, ...]
    codebook: tuple[float, ...]
    measured: bool = False
    down: tuple[float, ...] = ()

    def gauges(self) -> dict[str, float]:
        """Returns the traffic as metrics of the sending modules."""
        gauges = {}
        for k, (raw, wire, codebook) in enumerate(
            zip(self.raw, self.wire, self.codebook, strict=True)
        ):
            gauges[f"wire/module_{k}/bytes_per_image"] = wire
            gauges[f"wire/module_{k}/compression"] = raw / wire
            gauges[f"wire/module_{k}/codebook_share"] = codebook / wire
        for k, down in enumerate(self.down):
            gauges[f"wire/module_{k}/bytes_down_per_image"] = down
        return gauges


@dataclass
class Meter:
    """Counter of the bytes that cross one hop.

    Attributes:
      messages: bytes of payloads and contexts that travel up.
      codebooks: bytes of codebooks that travel up.
      images: number of images whose activations crossed.
      down_messages: bytes of messages that travel down, without codebooks.
      down_codebooks: bytes of codebooks that travel down.
      down_count: number of messages that travel down.
    """

    messages: int = 0
    codebooks: int = 0
    images: int = 0
    down_messages: int = 0
    down_codebooks: int = 0
    down_count: int = 0

    def count(self, payload: Any, context: Context, codebook: Any = ()) -> None:
        """Counts one message to the module above and the codebook sent with it, if any."""
        self.messages += nbytes((payload, context))
        self.codebooks += nbytes(codebook)
        self.images += context["id"].shape[0]

    def count_from_above(self, message: Any, codebook: Any = ()) -> None:
        """Counts one message from the module above and the codebook sent with it, if any."""
        self.down_messages += nbytes(message)
        self.down_codebooks += nbytes(codebook)
        self.down_count += 1

    def add(self, other: "Meter") -> None:
        """Adds what another meter has counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class MessageSpec(NamedTuple):
    """Shapes and dtypes of the messages that cross a hop.

    Attributes:
      activations: activations of the module below, decoded.
      payload: the encoded activations.
      codebook: the codebook; `()` if the codec has none.
      period: updates between two codebooks; 0 if the codec has none.
      down: message that the module above sends back for each batch, with the codebook that encodes
        it, which is sent once per `period`; `()` if nothing travels down.
      refresh: updates of the module above between two publications of parameters; 0 if it
        publishes none.
    """

    activations: jax.ShapeDtypeStruct
    payload: Any
    codebook: Any
    period: int
    down: Any = ()
    refresh: int = 0

    def down_bytes(self) -> tuple[float, float]:
        """Returns the bytes that travel down per batch, without codebooks and of codebooks."""
        message = self.down or Message()
        codebook = nbytes(message.codebook) / self.period if self.period else 0.0
        published = nbytes(message.published) / max(self.refresh, 1)
        return nbytes(message.payload) + published, codebook


@dataclass(frozen=True)
class TrainSpec:
    """Device-independent description of the training run, shared by all engines.

    Attributes:
      modules: the network, cut into modules with their objectives.
      method: the training rule, a `methods.Method`.
      optimizer: the optimizer of all modules; each module has its own optimizer state.
      task: describes the examples and turns stored inputs into network inputs.
      codec: encodes the activations between modules.
      seed: seed of the parameters and of the augmentation.
      batch_size: examples per batch, over all devices together.
      decode: "sent" or "latest": the codebook that decodes a message from a ring.
      accumulate: number of micro-batches that a batch is split into.
      ema: decay of the moving average of parameters for evaluation; 0 for no average.
    """

    modules: tuple[LocalModule, ...]
    method: Any  # `methods` imports this file, so that its type cannot be named here
    optimizer: optax.GradientTransformation
    task: Task
    codec: Codec
    seed: int
    batch_size: int
    decode: str = "sent"
    accumulate: int = 1
    ema: float = 0.0

    def inputs(self) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of a batch of network inputs."""
        return self.task.inputs(self.batch_size)

    def batch(self) -> Batch:
        """Returns shapes and dtypes of a batch from the source."""
        example: Any = self.task.example
        stored: Any = jax.ShapeDtypeStruct((self.batch_size, *example.shape), example.dtype)
        return Batch(stored, self.context(0), jax.ShapeDtypeStruct((), "int32"))  # type: ignore[arg-type]

    def init(self) -> tuple[ModuleState, ...]:
        """Returns fresh states of all modules."""
        return _init_program(self)(rngs.root(self.seed))

    def abstract_states(self) -> tuple[ModuleState, ...]:
        """Returns shapes and dtypes of the states that `init` returns."""
        return _init_program(self).shapes(rngs.root(0))

    def _states(self, key: jax.Array) -> tuple[ModuleState, ...]:
        context = {"image": self.inputs(), **self.context(0)}
        states = list(init_states(self.modules, self.optimizer, key, self.inputs(), context))
        for k, activations in enumerate(self.shapes(states)[1:]):
            codec_state = self.codec.init(activations)
            if jax.tree.leaves(codec_state):
                states[k] = dataclasses.replace(states[k], extras={"codec": codec_state})
        for k, state in enumerate(states):
            states[k] = dataclasses.replace(
                state, extras=state.extras | self.method.extras(self, k, states)
            )
        return tuple(map(ema.begin, states)) if self.ema else tuple(states)

    def shapes(self, states: Sequence[ModuleState]) -> list[jax.ShapeDtypeStruct]:
        """Returns shape and dtype of each module's inputs, after decoding.

        Args:
          states: states of all modules, or their shapes and dtypes.
        """
        shapes = [self.inputs()]
        for module, state in zip(self.modules[:-1], states):
            shapes.append(output_shape(module, state.params, state.batch_stats, shapes[-1]))
        return shapes

    def codebook(self, state: ModuleState) -> Any:
        """Returns the codebook that decodes the messages of a module.

        Args:
          state: the sender's state.

        Returns:
          The codebook; `()` if the codec has none or the module sends nothing.
        """
        return self.codec.codebook(state.extras["codec"]) if "codec" in state.extras else ()

    @cached_property
    def hops(self) -> tuple[MessageSpec, ...]:
        """Returns the messages that cross each hop, one entry per hop."""
        states, hops = self.abstract_states(), []
        for k, (state, activations) in enumerate(zip(states, self.shapes(states)[1:])):
            codebook = jax.eval_shape(self.codebook, state)
            payload = jax.eval_shape(self.codec.encode, codebook, activations)
            down = state.extras.get("above", ((),))[0]
            hops.append(
                MessageSpec(
                    *(activations, payload, codebook, self.codec.period(activations), down),
                    refresh=self.refresh(k),
                )
            )
        return tuple(hops)

    def needs(self, k: int, answering: bool = False) -> tuple[str, ...]:
        """Returns the names of the context arrays that must reach module k.

        These are `id` and the names that the objectives and adapters of module k and of the
        modules above read.

        Args:
          k: index of the module; the number of modules itself is allowed and needs only `id`.
          answering: return the names needed in an evaluation, where objectives read no context and
            `id` is not used.
        """
        return self._needs[answering][k]

    @cached_property
    def _needs(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        def names(k: int, answering: bool) -> tuple[str, ...]:
            readers: list[Any] = [
                part
                for m in self.modules[k:]
                for part in (m.adapter, None if answering else m.objective)
            ]
            needed = {name for reader in readers if reader is not None for name in reader.needs}
            return tuple(sorted(needed if answering else {"id", *needed}))

        modules = range(len(self.modules) + 1)
        return [names(k, False) for k in modules], [names(k, True) for k in modules]

    def reads(self, k: int) -> tuple[str, ...]:
        """Returns the names of the publications that the objective of module k reads.

        The last module reads none, as no module above it can publish.
        """
        objective = self.modules[k].objective if 0 <= k < len(self.modules) - 1 else None
        return () if objective is None else objective.reads

    def refresh(self, k: int) -> int:
        """Returns the updates of module k + 1 between two publications that module k reads.

        Returns 0 if the objective of module k reads none.
        """
        objective = self.modules[k].objective
        return objective.refresh if objective and "next_block" in self.reads(k) else 0

    def carried(self, k: int, context: Context, added: Context | None = None) -> Context:
        """Selects the context that travels to module k.

        Args:
          k: index of the receiving module.
          context: context that the module below received.
          added: context arrays that the module below adds.
        """
        available = context | dict(added or {})
        return {name: available[name] for name in self.needs(k)}

    def context(self, k: int) -> Any:
        """Returns shapes and dtypes of the context that reaches module k.

        For k = 0 these are all arrays that the source yields, needed or not.
        """
        shapes = {"id": (self.batch_size,), "label": (self.batch_size, *self.task.label)}
        known = {name: jax.ShapeDtypeStruct(shape, "int32") for name, shape in shapes.items()}
        if k:
            known["image"] = self.inputs()
            known = {name: known[name] for name in self.needs(k)}
        return known

    def traffic(self, meters: Sequence[Meter] = ()) -> Traffic:
        """Computes the bytes per image that cross each hop.

        Args:
          meters: one per hop. Hops whose meter has counted messages are reported as measured; for
            the others, and without meters, the sizes follow from the shapes of the encoded arrays.
        """
        if not self.method.sends:
            return Traffic((), (), ())
        size = self.batch_size
        raw, up, down = [], [], []  # up and down: bytes of messages and of codebooks
        for k, hop in enumerate(self.hops, 1):
            context, period = nbytes(self.context(k)), max(hop.period, 1)
            below, below_codebook = hop.down_bytes()
            sent = hop.down or Message()
            # The payload of a message from above is a gradient of the activations.
            gradient = nbytes(hop.activations) if nbytes(sent.payload) else 0
            raw_down = gradient + nbytes(sent.published) / max(hop.refresh, 1)
            raw.append((nbytes(hop.activations) + context + raw_down) / size)
            up.append(
                ((nbytes(hop.payload) + context) / size, nbytes(hop.codebook) / period / size)
            )
            down.append((below / size, below_codebook / size))
        counted = [k for k, meter in enumerate(meters) if meter.images]
        for k in counted:
            m = meters[k]
            up[k] = (m.messages / m.images, m.codebooks / m.images)
            if m.down_count:
                images = m.down_count * size
                down[k] = (m.down_messages / images, m.down_codebooks / images)
        return Traffic(
            tuple(raw),
            tuple(sum(parts) for parts in zip(map(sum, up), map(sum, down))),
            tuple(a + b for (_, a), (_, b) in zip(up, down)),
            bool(counted),
            tuple(map(sum, down)) if any(map(any, down)) else (),
        )


@cached_program(8)
def _init_program(spec: TrainSpec) -> DrawnFirst:
    """Returns the function that initializes all states from the root key."""
    # The function runs once, so that compile time dominates. A lower optimization level cuts it on
    # a CPU and does not change the values.
    options = {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else None
    return DrawnFirst(spec._states, options)
