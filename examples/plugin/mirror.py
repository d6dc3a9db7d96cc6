"""An objective that reads a moving average of the first block of the next module, which it puts in front of its head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dgl_jax.config import ObjectiveSettings
from dgl_jax.fields import number
from dgl_jax.objectives import (
    LocalLoss,
    Objective,
    ObjectiveInputs,
    ObjectiveKind,
    classification,
    register_objective,
)
from dgl_jax.types import Context


class Mirror(Objective):
    """Cross entropy of a head that sees the features as the next module would; gradients go through the copy, not into it.

    Attributes:
      following: the next block of the network; None of the last module.
    """

    head: nn.Module
    following: nn.Module | None
    decay: float = 0.9

    reads: ClassVar[tuple[str, ...]] = ("next_block",)

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """See `Objective`."""
        return classification(self.predict(features, published, train), context["label"])

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits."""
        if self.following is not None and "next_block" in published:
            copy = jax.lax.stop_gradient(published["next_block"])
            block: Any = self.following.clone(parent=None)
            features, _ = block.apply(
                copy, features, train, mutable=["batch_stats"]
            )  # of which nothing is kept
        return self.head(features, train)


@dataclass(frozen=True)
class MirrorOptions(ObjectiveSettings):
    """How slowly the copy follows."""

    decay: float = number(0.9, 0.0, 0.999999)


def make(options: MirrorOptions, inputs: ObjectiveInputs) -> Mirror:
    """Returns the objective of one module."""
    following = inputs.blocks[inputs.end] if inputs.end < len(inputs.blocks) else None
    return Mirror(inputs.head, following, options.decay)


register_objective("mirror", ObjectiveKind(make, MirrorOptions))
