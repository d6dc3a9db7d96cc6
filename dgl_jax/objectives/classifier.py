"""The usual local loss: every module minimises the cross entropy of its own head (Belilovsky et al. 2020, section 3)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dgl_jax.errors import UserError
from dgl_jax.objectives.base import Context, LocalLoss, Objective, ObjectiveInputs, ObjectiveKind
from dgl_jax.registry import OBJECTIVES
from dgl_jax.types import AnyArray


class Classifier(Objective):
    """A head and the cross entropy of its logits; its parameters are the head's.

    Attributes:
      head: Flax module called as `head(x, train)` that gives logits (B, classes), or (B, T, classes) for a label a token.
      label_smoothing: see `cross_entropy`.
    """

    head: nn.Module
    label_smoothing: float = 0.0

    def setup(self) -> None:
        """Gives the head this module's own scope: no name stands between them."""
        nn.share_scope(self, self.head)

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """See `Objective`; needs `label`, int (B,) or (B, T); gives `loss` (nats) and `accuracy`."""
        return classification(self.head(features, train), context["label"], self.label_smoothing)

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits."""
        return self.head(features, train)


def classification(
    logits: Float[Array, "*B C"], label: Int[AnyArray, "*B"], smoothing: float = 0.0
) -> LocalLoss:
    """Returns the cross entropy with the metrics `loss` (nats) and `accuracy` over all labels; see `cross_entropy`."""
    loss, count = cross_entropy(logits, label, smoothing), jnp.float32(label.size)
    right = jnp.sum(jnp.argmax(logits, axis=-1) == label, dtype=jnp.float32)
    return LocalLoss(loss, {"loss": (loss * count, count), "accuracy": (right, count)}, logits)


def cross_entropy(
    logits: Float[Array, "*B C"], label: Int[AnyArray, "*B"], smoothing: float = 0.0
) -> Float[Array, ""]:
    """Returns the mean over the batch, in nats, computed in float32.

    Args:
      smoothing: share of each target that is spread evenly over all C classes, its own included (Szegedy et al. 2016, section 7).

    Raises:
      UserError: the logits are not one row a label.
    """
    if logits.shape[:-1] != label.shape:
        raise UserError(
            f"config.model.head: gives logits of shape {logits.shape} for labels of shape {label.shape}, and must give a row of "
            "logits for each label; choose another head (the classifier of the network is the last module's)"
        )
    logits = logits.astype(jnp.float32)
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    targets = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def accuracy(logits: Float[Array, "*B C"], label: Int[AnyArray, "*B"]) -> Float[Array, ""]:
    """Returns the fraction of the batch whose largest logit is the label's, from 0 to 1."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == label)


def _make(options: Any, inputs: ObjectiveInputs) -> Classifier:
    return Classifier(inputs.head, inputs.label_smoothing)


OBJECTIVES.ship(classifier=ObjectiveKind(_make))
