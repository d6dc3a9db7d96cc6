"""Default local loss: cross entropy of a head per module (Belilovsky et al. 2020, section 3)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dgl_jax.config.registry import OBJECTIVES
from dgl_jax.errors import UserError
from dgl_jax.objectives.base import Context, LocalLoss, Objective, ObjectiveInputs, ObjectiveKind
from dgl_jax.types import PADDING, AnyArray


class Classifier(Objective):
    """Cross entropy of a head's logits; its parameters are those in the head.

    Attributes:
      head: Flax module called as `head(x, train)`. It returns logits [B, classes], or
        [B, T, classes] for one label per token.
      label_smoothing: see `cross_entropy`.
    """

    head: nn.Module
    label_smoothing: float = 0.0

    def setup(self) -> None:
        """Shares this module's scope with the head, so parameter paths get no extra level."""
        nn.share_scope(self, self.head)

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Computes cross entropy and accuracy for `label`, int [B] or [B, T]; see `Objective`."""
        return classification(self.head(features, train), context["label"], self.label_smoothing)

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits of the head."""
        return self.head(features, train)


def classification(
    logits: Float[Array, "*B C"], label: Int[AnyArray, "*B"], smoothing: float = 0.0
) -> LocalLoss:
    """Computes cross entropy with the metrics `loss` (nats) and `accuracy` over all labels.

    Args:
      logits: one row of C logits per label, [..., C].
      label: class indices, [...]; places labeled PADDING do not count.
      smoothing: see `cross_entropy`.
    """
    loss, real = cross_entropy(logits, label, smoothing), label != PADDING
    count = jnp.sum(real, dtype=jnp.float32) if label.ndim > 1 else jnp.float32(label.size)
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == label) & real, dtype=jnp.float32)
    return LocalLoss(loss, {"loss": (loss * count, count), "accuracy": (correct, count)}, logits)


def cross_entropy(
    logits: Float[Array, "*B C"], label: Int[AnyArray, "*B"], smoothing: float = 0.0
) -> Float[Array, ""]:
    """Computes the mean cross entropy over all labels, in nats and in float32.

    Args:
      logits: one row of C logits per label, [..., C].
      label: class indices, [B] or [B, T]. Of several labels per example, those that are PADDING do
        not count; the loss is 0 if no other is left.
      smoothing: share of each target that is spread evenly over all C classes, including the
        labeled one (Szegedy et al. 2016, section 7).

    Raises:
      UserError: the logits do not have one row per label.
    """
    if logits.shape[:-1] != label.shape:
        raise UserError(
            f"config.model.head: returns logits of shape {logits.shape} for labels of shape "
            f"{label.shape}, but must return one row of logits for each label; choose another head "
            "(the last module uses the network's classifier instead)"
        )
    logits = logits.astype(jnp.float32)
    if smoothing:
        targets = optax.smooth_labels(
            jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype), smoothing
        )
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    if label.ndim == 1:  # whole examples are padding in evaluation only
        return losses.mean()
    real = label != PADDING
    return jnp.sum(jnp.where(real, losses, 0.0)) / jnp.maximum(real.sum(), 1)


def accuracy(logits: Float[Array, "*B C"], label: Int[AnyArray, "*B"]) -> Float[Array, ""]:
    """Returns the fraction (0 to 1) of labels whose class has the largest logit."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == label)


def _make(options: Any, inputs: ObjectiveInputs) -> Classifier:
    return Classifier(inputs.head, inputs.label_smoothing)


OBJECTIVES.ship(classifier=ObjectiveKind(_make))
