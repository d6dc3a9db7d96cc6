"""An objective that is built from the following blocks: the head of a module looks at what the next block would make of it."""

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
    """Cross entropy of a head behind a copy of the next block, which trains with the head and goes nowhere else.

    Attributes:
      following: the next block of the network; None of the last module.
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
        """See `Objective`."""
        return classification(self.predict(features, published, train), context["label"])

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits."""
        return self.head(
            features if self.following is None else self.following(features, train), train
        )


def make(options: ObjectiveSettings, inputs: ObjectiveInputs) -> Lookahead:
    """Returns the objective of one module."""
    following = inputs.blocks[inputs.end] if inputs.end < len(inputs.blocks) else None
    return Lookahead(inputs.head, following)


register_objective("lookahead", ObjectiveKind(make))
