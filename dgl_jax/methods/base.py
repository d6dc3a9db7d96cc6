"""What training rules share: the way of a batch through a module, and the types of their programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from dgl_jax.codecs import relative_error
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, eval_step
from dgl_jax.registry import Kind
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import augment_key
from dgl_jax.types import Batch, Context, Message

# (state, what came in: a Batch or a Message, the context of its examples) -> (state, a Message to the next module or None, metrics)
Program = Callable[[ModuleState, Any, Context], tuple[ModuleState, Message | None, Metrics]]


States = tuple[ModuleState, ...]

# (states of all modules, batch) -> (states, metrics of each module)
TrainStep = Callable[[States, Batch], tuple[States, tuple[Metrics, ...]]]


@dataclass(frozen=True)
class Ports:
    """Where batches enter module k and leave it: receive, apply the module, hand on.

    Training, feeding, evaluation and export all go this way, so a network answers as it was trained.
    """

    spec: TrainSpec
    k: int

    def receive(self, incoming: Batch | Message | jax.Array) -> tuple[jax.Array, Metrics]:
        """Makes the module's inputs of what comes in.

        Args:
          incoming: a Batch to learn from, which is augmented; stored inputs to answer about; or what the module below handed on.

        Returns:
          The inputs; and, if the newest codebook decodes, `codec_drift`: how far they are from what was sent.
        """
        if isinstance(incoming, Batch):
            return entrance(self.spec, incoming), {}
        if not isinstance(incoming, Message):
            return self.spec.task.evaluate(incoming), {}
        inputs = self.spec.codec.decode(incoming.codebook, incoming.payload)
        if incoming.newest is None:
            return inputs, {}
        drifted = self.spec.codec.decode(incoming.newest, incoming.payload)
        return drifted, {"codec_drift": relative_error(inputs, drifted)}

    def added(self, inputs: jax.Array, above: bool = False) -> Context:
        """Returns what the module adds to the context: the first one the image, as the network sees it, if an objective asks.

        Args:
          above: only what an objective of another module asks for.
        """
        return {"image": inputs} if self.k == 0 and "image" in self.spec.needs(int(above)) else {}

    def hand_on(self, outputs: jax.Array, codebook: Any, inputs: jax.Array | None = None) -> Message:
        """Encodes the module's outputs for the next one.

        Args:
          codebook: of the codec; `()` if it has none.
          inputs: the module's, of which the context may need something above; None in evaluation.
        """
        added = {} if inputs is None else self.added(inputs, above=True)
        return Message(self.spec.codec.encode(codebook, outputs), codebook, context=added)


def evaluate(
    spec: TrainSpec, k: int, params: Any, batch_stats: Any, codebook: Any, incoming: Message | jax.Array
) -> tuple[Message | None, jax.Array | None]:
    """Evaluates module k.

    Args:
      codebook: the published one of this module; `()` if the codec has none.
      incoming: stored inputs for the first module, else what the module below handed on.

    Returns:
      What goes to the next module (None from the last), and what this one answers (None without an answer).
    """
    ports = Ports(spec, k)
    inputs, _ = ports.receive(incoming)
    outputs, logits = eval_step(spec.modules[k], params, batch_stats, inputs)
    return None if k == len(spec.modules) - 1 else ports.hand_on(outputs, codebook), logits


def entrance(spec: TrainSpec, batch: Batch) -> jax.Array:
    """Makes network inputs of a stored batch: the augmentation of step n is drawn from the seed and n alone."""
    return spec.task.train(augment_key(spec.seed, batch.step), batch.inputs)


class Method(Protocol):
    """A training rule, as pure functions of a `TrainSpec`; a frozen dataclass.

    Attributes:
      local: every module carries an objective of its own; else the last one's is the only one.
      sends: messages travel between modules.
    """

    local: bool
    sends: bool

    def fused(self, spec: TrainSpec) -> TrainStep:
        """Returns one update of all modules on one batch."""

    def program(self, spec: TrainSpec, k: int) -> Program:
        """Returns one update of module k on what comes in, for `jax.jit` (donate the state).

        Like `feed`, not asked of a method whose kind leaves `fused` as the only engine.
        """

    def feed(self, spec: TrainSpec, k: int, train: bool) -> Callable[[ModuleState, Any], Message]:
        """Returns what a module that is done does: it hands on, and updates nothing."""


@dataclass(frozen=True)
class MethodKind(Kind):
    """A training rule: `make()` returns a `Method`.

    Attributes:
      local: every module carries an objective of its own; see `Method`.
      engines: names of the engines that run it; None: all.
    """

    local: bool = True
    engines: tuple[str, ...] | None = None
