"""Objective `info_pro`: reconstruction of the image beside the task's loss (Wang et al. 2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dgl_jax.config import Settings
from dgl_jax.config.fields import choice, number, option
from dgl_jax.config.registry import OBJECTIVES
from dgl_jax.errors import UserError
from dgl_jax.models.blocks import Conv, conv_norm
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
from dgl_jax.types import AnyArray

_HIDDEN = 12  # channels of the decoder's hidden layer
_PROJECTION = 128  # values per example that the contrastive form compares


class Decoder(nn.Module):
    """Decoder from a feature map to the logits of an image's values.

    The layers are a bilinear resize to the size of the image (the corners of both coincide), a 3x3
    convolution to 12 channels, batch norm, ReLU, and a 3x3 convolution to the image's channels.

    Attributes:
      shape: height, width and channels of the image.
      dtype: dtype of the arithmetic; the logits are float32.
      ops: see `dgl_jax.ops`.
    """

    shape: tuple[int, int, int]
    dtype: str = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B H W c"]:
        height, width, channels = self.shape
        for axis, size in ((1, height), (2, width)):
            weights = jnp.asarray(interpolation(x.shape[axis], size), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(x, weights, ((axis,), (1,))), -1, axis)
        x = conv_norm(x, train, _HIDDEN, relu=True, dtype=self.dtype, ops=self.ops)
        x = Conv(channels, dtype=self.dtype, ops=self.ops)(x)
        return x.astype(jnp.float32)


def interpolation(size: int, target: int) -> np.ndarray:
    """Returns the matrix [target, size] of linear interpolation with coinciding end points."""
    places = np.linspace(0, size - 1, target) if target > 1 else np.zeros(1)
    return np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(size)))


class InfoPro(Objective):
    """`reconstruction` x reconstruction error + `task` x loss of the task.

    The reconstruction error is the mean binary cross entropy between the decoder's values and the
    augmented image, scaled back to [0, 1].

    Attributes:
      head: Flax module called as `head(x, train)` that returns logits, or with `contrast` the
        vectors to compare; None without a loss of the task.
      reconstruction: weight of the reconstruction error; without it there is no decoder.
      task: weight of the loss of the task.
      contrast: True compares vectors with `contrastive_loss` instead of classifying.
      temperature: see `contrastive_loss`.
      mean: mean of each channel by which images were normalized.
      std: standard deviation of each channel, likewise.
      label_smoothing: see `cross_entropy`.
      dtype: see `Decoder`.
      ops: see `dgl_jax.ops`.
    """

    head: nn.Module | None
    reconstruction: float
    task: float
    contrast: bool = False
    temperature: float = 0.07
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    dtype: str = "float32"
    ops: str = "auto"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Returns the context of the parts that have a weight."""
        return ("label",) * (self.head is not None) + ("image",) * (self.reconstruction > 0)

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "B H W C"],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Computes the loss, with the metrics `reconstruction`, and `accuracy` or `contrast`.

        Raises:
          UserError: features or examples are no maps; or `contrast` does not have exactly one label
            per example.
        """
        count = jnp.float32(len(features))
        loss, metrics, predictions = jnp.float32(0), {}, None
        if self.reconstruction:
            error = self._reconstruction_error(features, context["image"], train)
            loss += self.reconstruction * error
            metrics["reconstruction"] = (error * count, count)
        if self.head is not None and self.contrast:
            term = contrastive_loss(self.head(features, train), context["label"], self.temperature)
            loss += self.task * term
            metrics["contrast"] = (term * count, count)
        elif self.head is not None:
            local = classification(
                self.head(features, train), context["label"], self.label_smoothing
            )
            loss += self.task * local.loss
            metrics, predictions = local.metrics | metrics, local.predictions
        return LocalLoss(loss, metrics | {"loss": (loss * count, count)}, predictions)

    def predict(
        self, features: Float[Array, "B H W C"], published: Mapping[str, Any], train: bool
    ) -> Array | None:
        """Returns the logits of the head; None if there is none, or with `contrast`."""
        return None if self.head is None or self.contrast else self.head(features, train)

    def exchange(self, features: jax.ShapeDtypeStruct) -> Exchange:
        """Returns vectors, their gradients, labels and a count, if examples are compared."""
        if self.head is None or not self.contrast:
            return Exchange()
        rows = 4 * features.shape[0]
        return Exchange((_PROJECTION * rows, 4), (_PROJECTION * rows, rows))

    def _reconstruction_error(self, features: Array, image: Any, train: bool) -> Array:
        if features.ndim != 4 or image.ndim != 4:
            raise UserError(
                "config.objective.name=info_pro: reconstructs images (B, H, W, C) from maps, not "
                f"examples of shape {image.shape[1:]} from features of shape {features.shape[1:]}; "
                "classifier or auglocal fit this network"
            )
        if len(self.mean) != image.shape[3]:
            raise UserError(
                "config.objective.name=info_pro: reconstructs images whose mean and standard "
                f"deviation are known, not examples of shape {image.shape[1:]}; classifier or "
                "auglocal fit them"
            )
        logits = Decoder(image.shape[1:], self.dtype, self.ops, name="decoder")(features, train)
        return reconstruction_error(logits, image, self.mean, self.std)


def reconstruction_error(
    logits: Float[Array, "B H W C"],
    image: Float[AnyArray, "B H W C"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, ""]:
    """Computes the mean binary cross entropy between a decoder's values and an image, in nats.

    Args:
      logits: logits of the decoder's values.
      image: normalized image; its values become targets in [0, 1].
      mean: mean of each channel by which the image was normalized.
      std: standard deviation of each channel, likewise.
    """
    targets = image.astype(logits.dtype) * np.asarray(std) + np.asarray(mean)
    targets = jnp.clip(targets, 0.0, 1.0).astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def contrastive_loss(
    x: Float[Array, "B D"], label: Int[AnyArray, "*B"], temperature: float
) -> Float[Array, ""]:
    """Computes the supervised contrastive loss (Khosla et al. 2020, equation 2) of one batch.

    Each example is compared with all others; the positives are of the same class. Examples without
    a positive do not count.

    Args:
      x: vectors to compare, normalized here to length 1.
      label: class indices.
      temperature: divides the cosine similarities.

    Raises:
      UserError: there is not exactly one label per example.
    """
    if label.ndim != 1:
        raise UserError(
            "config.objective.form=contrast: compares whole examples, and the labels here have "
            f"shape {label.shape}; softmax fits this task"
        )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    unit = x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=1, keepdims=True), 1e-12))
    similarity = jnp.matmul(unit, unit.T, precision="highest") / temperature
    itself = jnp.eye(len(x), dtype=bool)
    others = jnp.where(itself, -jnp.inf, similarity)
    log_share = similarity - jax.nn.logsumexp(others, axis=1, keepdims=True)
    positive = (label[:, None] == label) & ~itself
    positives = positive.sum(axis=1)
    each = -jnp.where(positive, log_share, 0.0).sum(axis=1) / jnp.maximum(positives, 1)
    return each.sum() / jnp.maximum((positives > 0).sum(), 1)


@dataclass(frozen=True)
class InfoProOptions(HiddenOptions):
    """Options of the objective `info_pro`.

    Weights are given for the first module and the last but one and are linear in between; the last
    module minimizes cross entropy alone.

    Attributes:
      form: loss of the task: cross entropy of the head ("softmax"), or the supervised contrastive
        loss of 128 values per example ("contrast"), which needs large batches.
      reconstruction_weights: weights of the reconstruction error.
      task_weights: weights of the loss of the task. A module of weight 0 has no head and predicts
        nothing.
      temperature: temperature of the contrastive loss.
    """

    form: str = choice("softmax", "contrast")
    reconstruction_weights: tuple[float, ...] = option((5.0, 0.0))
    task_weights: tuple[float, ...] = option((0.5, 2.0))
    temperature: float = number(
        0.07, 0.0, 1e6, exclusive=True, applies={"objective.form": ("contrast",)}
    )

    def check(self, settings: Settings) -> None:
        """Raises UserError if weights are no pairs, or micro-batches would change the loss."""
        super().check(settings)
        for name in ("reconstruction_weights", "task_weights"):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < 0:
                raise UserError(
                    f"config.objective.{name}={pair}: must be two numbers of at least 0, for the "
                    "first module and the last but one"
                )
        for first, last in (
            (self.reconstruction_weights[0], self.task_weights[0]),
            (self.reconstruction_weights[1], self.task_weights[1]),
        ):
            if not first and not last:
                raise UserError(
                    f"config.objective.task_weights={self.task_weights}: a module would have "
                    "nothing to minimize, because its reconstruction weight is 0 as well"
                )
        if self.form == "contrast":
            refuse_micro_batches(settings, "info_pro with config.objective.form=contrast")

    def remarks(self, settings: Settings, classes: int) -> list[str]:
        """Warns if most examples have no other one of their class in a batch."""
        size = settings.data.batch_size
        if self.form != "contrast" or settings.model.modules == 1 or size > classes:
            return []
        return [
            f"config.data.batch_size={size}: with {classes} classes, an example rarely meets "
            "another one of its class, without which config.objective.form=contrast teaches "
            "nothing; use a larger batch, or softmax"
        ]


def _make(options: InfoProOptions, inputs: ObjectiveInputs) -> Objective:
    if inputs.end == len(inputs.blocks):
        return Classifier(inputs.head, inputs.label_smoothing)
    place = inputs.k / (inputs.modules - 2) if inputs.modules > 2 else 0.0
    reconstruction, task = (
        first + place * (last - first)
        for first, last in (options.reconstruction_weights, options.task_weights)
    )
    contrast = options.form == "contrast"
    head: nn.Module | None = None
    if task:
        assert inputs.make_head is not None
        head = inputs.make_head(_PROJECTION) if contrast else inputs.head
    return InfoPro(
        head,
        reconstruction,
        task,
        contrast,
        options.temperature,
        inputs.mean,
        inputs.std,
        inputs.label_smoothing,
        inputs.dtype,
        inputs.ops,
    )


OBJECTIVES.ship(info_pro=ObjectiveKind(_make, InfoProOptions))
