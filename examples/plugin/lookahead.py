"""Objective built from the blocks that follow: the head reads features after a copy of the next."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from dgl_jax.config import ObjectiveSettings
from dgl_jax.objectives import (
    LocalLoss,
    Objective,
    ObjectiveInputs,
    ObjectiveKind,
    classification,
    register_objective,
)
from dgl_jax.types import Context


class Lookahead(Objective):
    """Cross entropy of a head on top of a private copy of the next block.

    The copy is trained together with the head and is used nowhere else.

    Attributes:
      head: Flax module called as `head(x, train)`.
      following: next block of the network; None for the last module.
    """

    head: nn.Module
    following: nn.Module | None

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
        return self.head(
            features if self.following is None else self.following(features, train), train
        )


def make(options: ObjectiveSettings, inputs: ObjectiveInputs) -> Lookahead:
    """Returns the objective of one module, with a copy of the block after it."""
    following = inputs.blocks[inputs.end] if inputs.end < len(inputs.blocks) else None
    return Lookahead(inputs.head, following)


register_objective("lookahead", ObjectiveKind(make))
