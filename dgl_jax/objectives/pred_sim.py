"""Objective `pred_sim`: similarity matching beside prediction (Nøkland and Eidnes 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dgl_jax.config import Settings
from dgl_jax.config.fields import number
from dgl_jax.config.registry import OBJECTIVES
from dgl_jax.errors import UserError
from dgl_jax.models.blocks import Conv, uniform_fan_in
from dgl_jax.objectives.base import (
    Context,
    Exchange,
    HiddenOptions,
    LocalLoss,
    Objective,
    ObjectiveInputs,
    ObjectiveKind,
    refuse_micro_batches,
)
from dgl_jax.objectives.classifier import Classifier, classification
from dgl_jax.ops import adaptive_avg_pool
from dgl_jax.types import AnyArray


class PredSim(Objective):
    """(1 - weight) x cross entropy of a head + weight x the similarity loss.

    For the similarity loss, a convolution without bias (a linear layer for tokens and features)
    transforms the module's activations; the standard deviation of each channel over the positions
    describes an example. The cosine similarities of all pairs of examples in the batch, each
    centered over its channels, shall equal the similarities of their labels.

    Attributes:
      head: Flax module called as `head(x, train)` that returns logits.
      classes: number of classes.
      weight: weight of the similarity loss, 0 to 1.
      kernel: height and width of the convolution; 0 for none.
      pool: average pooling of the maps in front of the convolution, by this factor.
      label_smoothing: see `cross_entropy`.
      dtype: dtype of the arithmetic; similarities are float32.
      ops: see `dgl_jax.ops`.
    """

    head: nn.Module
    classes: int
    weight: float = 0.99
    kernel: int = 3
    pool: int = 1
    label_smoothing: float = 0.0
    dtype: str = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Computes the loss, with the metrics `accuracy` and `similarity` (the similarity loss).

        Raises:
          UserError: there is not exactly one label per example, or a single channel.
        """
        label = context["label"]
        local = classification(self.head(features, train), label, self.label_smoothing)
        if label.ndim != 1:
            raise UserError(
                "config.objective.name=pred_sim: compares the labels of whole examples, and here "
                f"they have shape {label.shape}; classifier or auglocal fit this task"
            )
        if features.shape[-1] == 1:
            raise UserError(
                "config.objective.name=pred_sim: compares the channels of examples, and a module "
                "here has a single one; use more channels (config.model.width), or classifier"
            )
        error = similarity_loss(self._description(features), label, self.classes)
        loss, count = (1 - self.weight) * local.loss + self.weight * error, jnp.float32(len(label))
        metrics = {"loss": (loss * count, count), "similarity": (error * count, count)}
        return LocalLoss(loss, local.metrics | metrics, local.predictions)

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits of the head."""
        return self.head(features, train)

    def exchange(self, features: jax.ShapeDtypeStruct) -> Exchange:
        """Returns the vectors and one-hot labels of all examples, and the vectors' gradients."""
        vectors = 4 * features.shape[0] * features.shape[-1]
        labels = 4 * features.shape[0] * self.classes
        return Exchange((vectors,), (vectors, labels) if self.classes > 1 else (vectors,))

    def _description(self, x: Array) -> Float[Array, "B C"]:
        """Returns the vector that describes each example."""
        channels = x.shape[-1]
        if self.pool > 1 and x.ndim == 4:
            height, width = (max(1, side // self.pool) for side in x.shape[1:3])
            x = adaptive_avg_pool(x, (height, width), ops=self.ops)
        if self.kernel and x.ndim == 4:
            weights = uniform_fan_in(self.kernel**2 * channels)
            x = Conv(
                channels, self.kernel, 1, False, weights, self.dtype, self.ops, name="similar"
            )(x)
        elif self.kernel:
            weights = uniform_fan_in(channels)
            x = nn.Dense(
                channels, use_bias=False, dtype=self.dtype, kernel_init=weights, name="similar"
            )(x)
        x = x.astype(jnp.float32).reshape(len(x), -1, channels)
        return deviation(x) if x.shape[1] > 1 else x[:, 0]


def deviation(x: Float[Array, "B N C"]) -> Float[Array, "B C"]:
    """Returns the unbiased standard deviation over N positions; its gradient at 0 is 0."""
    centered = x - x.mean(axis=1, keepdims=True)
    return _root(jnp.square(centered).sum(axis=1) / (x.shape[1] - 1))


def similarity_loss(
    x: Float[Array, "B C"], label: Int[AnyArray, "*B"], classes: int
) -> Float[Array, ""]:
    """Computes the mean squared difference between the similarities of examples and of labels.

    The similarity of two examples is the cosine of their vectors after subtracting each vector's
    own mean; the similarity of two labels is the same for one-hot vectors: 1 within a class and
    -1 / (classes - 1) across classes. All pairs count, also an example with itself.

    Args:
      x: one vector per example.
      label: class indices.
      classes: number of classes.
    """
    targets = _similarities(jax.nn.one_hot(label, classes, dtype=x.dtype)) if classes > 1 else 1.0
    return jnp.mean(jnp.square(_similarities(x) - targets))


def _similarities(x: Float[Array, "B C"]) -> Float[Array, "B B"]:
    centered = x - x.mean(axis=1, keepdims=True)
    norm = _root(jnp.square(centered).sum(axis=1, keepdims=True))
    unit = centered / (norm + 1e-8)
    return jnp.clip(jnp.matmul(unit, unit.T, precision="highest"), -1.0, 1.0)


def _root(x: Array) -> Array:
    """Returns the square root, with a gradient of 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


@dataclass(frozen=True)
class PredSimOptions(HiddenOptions):
    """Options of the objective `pred_sim`.

    Attributes:
      similarity_weight: weight of the similarity loss; cross entropy has 1 minus it.
      similarity_kernel: height and width of the convolution in front of it, an odd number; 0: none.
      similarity_pool: average pooling of the maps in front of this convolution, by this factor.
    """

    similarity_weight: float = number(0.99, 0.0, 1.0)
    similarity_kernel: int = number(3, 0, 99)
    similarity_pool: int = number(1, 1, 1024)

    def check(self, settings: Settings) -> None:
        """Raises UserError if the kernel is even, or a batch is split into micro-batches."""
        super().check(settings)
        if self.similarity_kernel and self.similarity_kernel % 2 == 0:
            raise UserError(
                f"config.objective.similarity_kernel={self.similarity_kernel}: must be odd, or 0"
            )
        refuse_micro_batches(settings, "pred_sim")


def _make(options: PredSimOptions, inputs: ObjectiveInputs) -> Objective:
    if inputs.end == len(inputs.blocks):
        return Classifier(inputs.head, inputs.label_smoothing)
    return PredSim(
        inputs.head,
        inputs.classes,
        options.similarity_weight,
        options.similarity_kernel,
        options.similarity_pool,
        inputs.label_smoothing,
        inputs.dtype,
        inputs.ops,
    )


OBJECTIVES.ship(pred_sim=ObjectiveKind(_make, PredSimOptions))
