"""What training rules share: the way of a batch through a module, and the types of their programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from dgl_jax.codecs import relative_error
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, eval_step
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks.image_classification import augment_key
from dgl_jax.types import Batch, Coded, Targets

# (state, what came in: a Batch or a Coded, its targets) -> (state, what goes to the next module: a Coded or None, metrics)
Program = Callable[[ModuleState, Any, Targets], tuple[ModuleState, Coded | None, Metrics]]


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

    def receive(self, incoming: Batch | Coded | jax.Array) -> tuple[jax.Array, Metrics]:
        """Makes the module's inputs of what comes in.

        Args:
          incoming: a Batch to learn from, which is augmented; stored images to answer about; or what the module below handed on.

        Returns:
          The inputs; and, if the newest codebook decodes, `codec_drift`: how far they are from what was sent.
        """
        if isinstance(incoming, Batch):
            return entrance(self.spec, incoming), {}
        if not isinstance(incoming, Coded):
            return self.spec.preprocess.evaluate(incoming), {}
        inputs = self.spec.codec.decode(incoming.codebook, incoming.payload)
        if incoming.newest is None:
            return inputs, {}
        drifted = self.spec.codec.decode(incoming.newest, incoming.payload)
        return drifted, {"codec_drift": relative_error(inputs, drifted)}

    def hand_on(self, outputs: jax.Array, codebook: Any) -> Coded | None:
        """Encodes the module's outputs for the next one with a codebook (`()` if the codec has none); None from the last."""
        if self.k == len(self.spec.modules) - 1:
            return None
        return Coded(self.spec.codec.encode(codebook, outputs), codebook)


def evaluate(
    spec: TrainSpec, k: int, params: Any, batch_stats: Any, codebook: Any, incoming: Coded | jax.Array
) -> tuple[Coded | None, jax.Array | None]:
    """Evaluates module k.

    Args:
      codebook: the published one of this module; `()` if the codec has none.
      incoming: stored images for the first module, else what the module below handed on.

    Returns:
      What goes to the next module (None from the last), and the logits of the head (None without one).
    """
    ports = Ports(spec, k)
    inputs, _ = ports.receive(incoming)
    outputs, logits = eval_step(spec.modules[k], params, batch_stats, inputs)
    return ports.hand_on(outputs, codebook), logits


def entrance(spec: TrainSpec, batch: Batch) -> jax.Array:
    """Makes network inputs of a stored batch: the augmentation of step n is drawn from the seed and n alone."""
    return spec.preprocess.train(augment_key(spec.seed, batch.step), batch.images)
