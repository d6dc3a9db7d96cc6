"""Objective whose head reads features after a moving average of the next module's first block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dgl_jax.config import ObjectiveSettings
from dgl_jax.config.fields import number
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
    """Cross entropy of a head that reads the features after a copy of the next block.

    The copy comes from the next module. Gradients pass through it but do not change it.

    Attributes:
      head: Flax module called as `head(x, train)`.
      following: next block of the network; None for the last module.
      decay: decay of the moving average that forms the copy.
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
        """Computes the cross entropy of the logits against `label`; see `Objective`."""
        return classification(self.predict(features, published, train), context["label"])

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits of the head."""
        if self.following is not None and "next_block" in published:
            copy = jax.lax.stop_gradient(published["next_block"])
            block: Any = self.following.clone(parent=None)
            # The updated batch statistics are discarded: the next module owns them.
            features, _ = block.apply(copy, features, train, mutable=["batch_stats"])
        return self.head(features, train)


@dataclass(frozen=True)
class MirrorOptions(ObjectiveSettings):
    """Options of the objective `mirror`: the decay of the moving average."""

    decay: float = number(0.9, 0.0, 0.999999)


def make(options: MirrorOptions, inputs: ObjectiveInputs) -> Mirror:
    """Returns the objective of one module, which applies the block after it."""
    following = inputs.blocks[inputs.end] if inputs.end < len(inputs.blocks) else None
    return Mirror(inputs.head, following, options.decay)


register_objective("mirror", ObjectiveKind(make, MirrorOptions))
