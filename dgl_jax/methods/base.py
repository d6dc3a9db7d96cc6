"""Shared parts of training methods: module inputs and outputs, turn programs, whole steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax

from dgl_jax.codecs import encode_and_learn, relative_error
from dgl_jax.config.registry import Kind
from dgl_jax.core import rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, eval_step
from dgl_jax.schedule import Progress, Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Context, Inbox, Message, Outbox

# (state, inbox, context of the examples in the inbox) -> (new state, outbox, metrics)
Program = Callable[[ModuleState, Inbox, Context], tuple[ModuleState, Outbox, Metrics]]


States = tuple[ModuleState, ...]

# (states of all modules, batch or None if no turn reads one) -> (new states, metrics per turn)
TrainStep = Callable[[States, Batch | None], tuple[States, tuple[Metrics, ...]]]


@dataclass(frozen=True)
class Ports:
    """Input and output of module k: decode a message, encode the next one.

    Training, feeding by finished modules, evaluation and export all use this class, so that a
    network is evaluated on the same inputs as it was trained on.
    """

    spec: TrainSpec
    k: int

    def receive(self, incoming: Batch | Message | jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Converts a batch or a message to the module's inputs.

        Args:
          incoming: a Batch to train on, which is augmented; stored inputs to evaluate; or the
            message from the module below.

        Returns:
          The inputs, and the metric `codec_drift` if the newest codebook decodes them: their
          relative distance from the values that the sender encoded.
        """
        assert incoming is not None, "a turn that reads from below got no input"
        if isinstance(incoming, Batch):
            return training_inputs(self.spec, incoming), {}
        if not isinstance(incoming, Message):
            return self.spec.task.evaluate(incoming), {}
        inputs = self.spec.codec.decode(incoming.codebook, incoming.payload)
        if incoming.newest is None:
            return inputs, {}
        drifted = self.spec.codec.decode(incoming.newest, incoming.payload)
        return drifted, {"codec_drift": relative_error(inputs, drifted)}

    def full_context(self, inputs: jax.Array, context: Context, answering: bool = False) -> Context:
        """Returns the context together with the arrays that this module adds to it.

        Only the first module adds one: `image`, its preprocessed inputs, if any module needs it.

        Args:
          answering: True in evaluation, where objectives read no context.
        """
        return context | self._added(inputs, self.spec.needs(0, answering))

    def emit(
        self, outputs: jax.Array, codebook: Any, inputs: jax.Array, answering: Context | None = None
    ) -> Message:
        """Encodes the module's outputs as the message to the next module.

        Args:
          outputs: activations of the module.
          codebook: codebook of the codec; `()` if it has none.
          inputs: inputs of the module, which modules above may need as context.
          answering: in evaluation the full context of this module; None in training, where the
            caller carries the received context forward and the message holds only additions.
        """
        if answering is None:
            added = self._added(inputs, self.spec.needs(1))
        else:
            added = {name: answering[name] for name in self.spec.needs(self.k + 1, answering=True)}
        return Message(self.spec.codec.encode(codebook, outputs), codebook, context=added)

    def send(
        self, state: ModuleState, number: jax.Array, outputs: jax.Array, inputs: jax.Array
    ) -> tuple[ModuleState, Message, Metrics]:
        """Encodes the outputs of a training turn and updates the module's codec with them.

        Args:
          state: state of the module.
          number: [] number of messages that the module sent upward before.
          outputs: activations of the module.
          inputs: inputs of the module, see `emit`.

        Returns:
          The state with the new state of the codec, the message to the next module, and metrics.
        """
        key = rngs.codec(state.rng, number)
        learned, codebook, payload, metrics = encode_and_learn(
            self.spec.codec, state.extras.get("codec"), key, outputs, number
        )
        if "codec" in state.extras:
            state = replace(state, extras=state.extras | {"codec": learned})
        added = self._added(inputs, self.spec.needs(1))
        return state, Message(payload, codebook, context=added), metrics

    def _added(self, inputs: jax.Array, needs: Sequence[str]) -> Context:
        return {"image": inputs} if self.k == 0 and "image" in needs else {}


def evaluate(
    spec: TrainSpec,
    k: int,
    params: Any,
    batch_stats: Any,
    codebook: Any,
    published: Mapping[str, Any],
    incoming: Message | jax.Array,
) -> tuple[Message | None, jax.Array | None]:
    """Evaluates module k on one batch.

    Args:
      spec: description of the run.
      k: index of the module.
      params: parameters of the module.
      batch_stats: running statistics of batch norm.
      codebook: published codebook of this module; `()` if the codec has none.
      published: publications that the module's objective reads; {} if none.
      incoming: stored inputs for the first module, otherwise the message from the module below.

    Returns:
      The message to the next module (None from the last one), and the predictions of this module
      (None if it makes none).
    """
    ports = Ports(spec, k)
    inputs, _ = ports.receive(incoming)
    carried: Context = dict(incoming.context or {}) if isinstance(incoming, Message) else {}
    context = ports.full_context(inputs, carried, answering=True)
    outputs, answer = eval_step(spec.modules[k], params, batch_stats, inputs, context, published)
    return None if k == len(spec.modules) - 1 else ports.emit(
        outputs, codebook, inputs, context
    ), answer


def training_inputs(spec: TrainSpec, batch: Batch) -> jax.Array:
    """Converts a stored batch to augmented network inputs.

    The augmentation of step n is drawn from the seed and n alone.
    """
    return spec.task.train(rngs.augment_key(spec.seed, batch.step), batch.inputs)


class Method(Protocol):
    """Training rule as pure functions of a `TrainSpec`; implementations are frozen dataclasses.

    Attributes:
      sends: True if messages travel between modules.
    """

    sends: bool

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields the ticks that bring the run to step `until`; see `progress`.

        Ends early once `stop()` returns True; a method with delayed updates does so only after
        every module has made at least one update.

        Args:
          counts: current number of updates per module.
          until: step at which the schedule ends.
          total: updates per module at the end of training; modules that run ahead stop there.
          stop: polled between ticks; the schedule ends early once it returns True.
          overlap: True if modules have separate devices and work at the same time.
        """

    def ports(self, spec: TrainSpec, k: int, kind: str) -> tuple[Inbox, Outbox]:
        """Returns the ports that a turn of module k reads from and sends to.

        A port that the turn uses holds any value other than None.
        """

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns the program of a turn of module k, ready for `jax.jit` (donate the state)."""

    def fused(
        self, spec: TrainSpec, turns: Sequence[tuple[int, str]], barrier: bool = True
    ) -> TrainStep:
        """Returns one function for all turns (module, kind) of a tick; usually `composed`.

        Args:
          barrier: if False, XLA may optimize across turns, which changes results by rounding.
        """

    def feed(
        self, spec: TrainSpec, k: int, train: bool
    ) -> Callable[[ModuleState, Any, Context], Message]:
        """Returns the forward-only program of a finished module in asynchronous engines.

        It encodes the message to the next module and updates nothing.
        """

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the method's additions to the initial state of module k, by name.

        They are part of every checkpoint. Messages that wait between ticks are stored under the
        port they arrive at, `above` or `below`, as a tuple with the oldest first. A turn reads the
        oldest message; a new message is appended and the oldest is dropped.
        """

    def progress(self, counts: Sequence[int]) -> Progress:
        """Returns the progress of a run, given the updates that each module has made.

        Optional. Without it all modules update on the same batches, and the step of a run is the
        number of updates that every module has made. With it every update counts, and a
        synchronous engine reports each of them.
        """

    def check(self, spec: TrainSpec) -> None:
        """Raises UserError if the method does not support a part of the run; optional."""


@dataclass(frozen=True)
class MethodKind(Kind):
    """Registry entry of a training method: `make(options)` returns a `Method`.

    Attributes:
      local: True if every module has an objective; otherwise only the last one does.
      engines: names of the engines that support the method; None for all.
      in_turn: True if modules train one after the other, so that the order of all updates depends
        on the length of the run.
      delayed: modules update with gradients of earlier batches, so that each has made one update
        less than the one above it when a run stops.
      unlocked: several batches are between two modules when a run stops.
    """

    local: bool = True
    engines: tuple[str, ...] | None = None
    in_turn: bool = False
    delayed: bool = False
    unlocked: bool = False


def progress(method: Any, counts: Sequence[int]) -> Progress | None:
    """Returns `method.progress(counts)`; None if the method does not define it."""
    return method.progress(counts) if hasattr(method, "progress") else None


def steps_alone(spec: TrainSpec) -> bool:
    """Returns True if every turn is an update on input from below, so a module can run alone."""
    modules = len(spec.modules)
    first = next(spec.method.schedule([0] * modules, 1, 1), ())
    alone = len(first) == modules and all(turn.kind == "step" for turn in first)
    return bool(spec.method.sends and alone)
