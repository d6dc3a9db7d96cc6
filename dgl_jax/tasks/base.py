"""What a task is: what the examples of a run are, what networks read of them, and how answers are measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from dgl_jax.core import rngs
from dgl_jax.errors import UserError
from dgl_jax.registry import Kind
from dgl_jax.types import PADDING, AnyArray


def augment_key(seed: int | Int[AnyArray, ""], step: int | Int[AnyArray, ""]) -> Key[Array, ""]:
    """Returns the key that a batch is augmented with; see `rngs.augmentation`.

    It depends on nothing but its two arguments, so a resumed run draws what the whole run would have drawn. Both may
    be traced.
    """
    return rngs.augmentation(rngs.root(seed), step)


@dataclass(frozen=True)
class Task:
    """What the examples of a run are; a frozen, hashable dataclass of pure functions on whole batches, which are jitted.

    As it stands it classifies: a network answers with logits for each label, of which an example has one, or one for each token. A
    task of another kind overrides what differs.

    Attributes:
      example: shape and dtype of an example as it is stored.
      label: shape of the label of an example: (), or such as (T,) for a label a token.
    """

    example: jax.ShapeDtypeStruct
    label: tuple[int, ...] = ()

    def inputs(self, batch: int) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of a batch of network inputs."""
        found = jax.eval_shape(
            self.evaluate, jax.ShapeDtypeStruct((batch, *self.example.shape), self.example.dtype)
        )
        return jax.ShapeDtypeStruct(found.shape, found.dtype)

    def train(
        self, key: Key[Array, ""], inputs: Shaped[AnyArray, "B ..."]
    ) -> Shaped[Array, "B ..."]:
        """Makes network inputs of stored ones to learn from, augmented with draws from `key`; by default as `evaluate` does."""
        return self.evaluate(inputs)

    def evaluate(self, inputs: Shaped[AnyArray, "B ..."]) -> Shaped[Array, "B ..."]:
        """Makes network inputs of stored ones to answer about; by default they are the same."""
        return jnp.asarray(inputs)

    def answer(self, logits: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Turns what a head gives into what is measured: class probabilities (float32)."""
        return jax.nn.softmax(logits.astype(jnp.float32))

    def ensemble(self, answers: Sequence[Float[Array, "*B C"] | None]) -> Float[Array, "*B C"]:
        """Returns the mean of the modules' answers, module k with a weight proportional to 2^k; None is left out."""
        weights = [0.0 if a is None else 2.0**k for k, a in enumerate(answers)]
        return sum(w * a for w, a in zip(weights, answers) if a is not None) / sum(weights)  # type: ignore[return-value]

    def metrics(
        self, answer: Float[Array, "*B C"], label: Int[Array, "*B"]
    ) -> dict[str, tuple[Array, Array]]:
        """Measures the answers to a batch.

        Args:
          label: class numbers; places labelled PADDING do not count.

        Returns:
          By name (sum, count) over the labels: `accuracy`, by which the best checkpoint is chosen, and `loss` in nats.
        """
        real = label != PADDING
        correct = (jnp.argmax(answer, axis=-1) == label) & real
        nats = optax.softmax_cross_entropy_with_integer_labels(
            jnp.log(jnp.maximum(answer, 1e-30)), jnp.maximum(label, 0)
        )
        return {
            "accuracy": (correct.sum(), real.sum()),
            "loss": (jnp.where(real, nats, 0.0).sum(), real.sum()),
        }


@dataclass(frozen=True)
class TaskInputs:
    """What the factory of a task is told of the data set.

    Attributes:
      name: of the data set, as `config.data.name` has it.
      example: shape and dtype of an example as it is stored.
      label: shape of the label of an example.
      classes: how many there are.
      mean, std: of each channel; empty if the data set has none.
      augment: `config.data.augment`.
    """

    name: str
    example: jax.ShapeDtypeStruct
    label: tuple[int, ...]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str

    def require(self, fits: bool, task: str, needed: str) -> None:
        """Raises UserError unless the data set fits.

        Args:
          task: name of the task.
          needed: the examples that it works on, in words.
        """
        if not fits:
            raise UserError(
                f"config.task.name={task}: works on {needed}, and config.data.name={self.name} holds {self.example.dtype} examples "
                f"of shape {self.example.shape} with labels of shape {self.label}"
            )


@dataclass(frozen=True)
class TaskKind(Kind):
    """A task: `make(options, inputs)` returns a `Task`; `inputs` are `TaskInputs`.

    Attributes:
      images: the stored examples are images: the fields of `config.data` about them apply, and `--mode=predict` can read files.
    """

    images: bool = False
