"""Interface of tasks: how examples become network inputs, and how predictions are measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from dgl_jax.config.registry import Kind
from dgl_jax.errors import UserError
from dgl_jax.types import PADDING, AnyArray


@dataclass(frozen=True)
class Task:
    """Description of a run's examples: a frozen, hashable dataclass of pure functions on batches.

    Callers jit these functions. This base class classifies: an example has one label, or one per
    token, and the network returns logits for each label. Other tasks override what differs.

    Attributes:
      example: shape and dtype of a stored example.
      label: shape of the label of an example: () for one label, (T,) for one label per token.
    """

    example: jax.ShapeDtypeStruct
    label: tuple[int, ...] = ()

    def inputs(self, batch: int) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of a batch of network inputs."""
        converted = jax.eval_shape(
            self.evaluate, jax.ShapeDtypeStruct((batch, *self.example.shape), self.example.dtype)
        )
        return jax.ShapeDtypeStruct(converted.shape, converted.dtype)

    def train(
        self, key: Key[Array, ""], inputs: Shaped[AnyArray, "B ..."]
    ) -> Shaped[Array, "B ..."]:
        """Converts stored inputs to network inputs for training, augmented with draws from `key`.

        By default there is no augmentation: the result is the same as that of `evaluate`.
        """
        return self.evaluate(inputs)

    def evaluate(self, inputs: Shaped[AnyArray, "B ..."]) -> Shaped[Array, "B ..."]:
        """Converts stored inputs to network inputs for evaluation; by default unchanged."""
        return jnp.asarray(inputs)

    def answer(self, logits: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Converts logits to the predictions that are measured: class probabilities (float32)."""
        return jax.nn.softmax(logits.astype(jnp.float32))

    def ensemble(self, answers: Sequence[Float[Array, "*B C"] | None]) -> Float[Array, "*B C"]:
        """Returns the weighted mean of the modules' predictions; those that are None are left out.

        The weight of module k is proportional to 2^k.
        """
        weights = [0.0 if a is None else 2.0**k for k, a in enumerate(answers)]
        return sum(w * a for w, a in zip(weights, answers) if a is not None) / sum(weights)  # type: ignore[return-value]

    def metrics(
        self, answer: Float[Array, "*B C"], label: Int[Array, "*B"]
    ) -> dict[str, tuple[Array, Array]]:
        """Computes the evaluation metrics of a batch.

        Args:
          answer: class probabilities, [..., C].
          label: class indices, [...]; entries equal to PADDING do not count.

        Returns:
          (sum, count) over the labels by name: `accuracy`, which selects the best checkpoint, and
          `loss` in nats.
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
    """Facts about the data set that the factory of a task receives.

    Attributes:
      name: name of the data set, `config.data.name`.
      example: shape and dtype of a stored example.
      label: shape of the label of an example.
      classes: number of classes.
      mean, std: mean and standard deviation per channel; empty if the data set has none.
      augment: value of `config.data.augment`.
    """

    name: str
    example: jax.ShapeDtypeStruct
    label: tuple[int, ...]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str

    def require(self, fits: bool, task: str, needed: str) -> None:
        """Raises UserError unless the data set fits the task.

        Args:
          fits: True if the data set fits.
          task: name of the task.
          needed: description of the examples that the task needs, for the message.
        """
        if not fits:
            raise UserError(
                f"config.task.name={task}: needs {needed}, but config.data.name={self.name} has "
                f"{self.example.dtype} examples of shape {self.example.shape} with labels of shape "
                f"{self.label}"
            )


@dataclass(frozen=True)
class TaskKind(Kind):
    """Registry entry of a task: `make(options, inputs)` returns a `Task` for `TaskInputs`.

    Attributes:
      images: True if the stored examples are images. Then the image fields of `config.data` apply,
        and `--mode=predict` can read image files.
    """

    images: bool = False
