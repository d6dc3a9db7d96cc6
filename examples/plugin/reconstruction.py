"""An objective that reads the image: the cross entropy of a head, and how well the image can be drawn from the features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
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


class Reconstruction(Objective):
    """Cross entropy plus `weight` times the mean squared error of the image, drawn by one 1x1 convolution.

    The image is averaged to the size of the map: features that have been pooled cannot know more.
    """

    head: nn.Module
    weight: float

    needs: ClassVar[tuple[str, ...]] = ("label", "image")

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "B H W C"],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """See `Objective`; gives `loss`, `accuracy` and `reconstruction` (the error)."""
        image, answered = (
            context["image"],
            classification(self.head(features, train), context["label"]),
        )
        drawn = nn.Dense(image.shape[-1], name="draw")(features)
        small = jax.image.resize(image, drawn.shape, "linear", antialias=True)
        error, count = jnp.mean(jnp.square(drawn - small)), jnp.float32(len(image))
        loss = answered.loss + self.weight * error
        own = {"loss": (loss * count, count), "reconstruction": (error * count, count)}
        return LocalLoss(loss, answered.metrics | own, answered.predictions)

    def predict(
        self, features: Float[Array, "B H W C"], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits."""
        return self.head(features, train)


@dataclass(frozen=True)
class ReconstructionOptions(ObjectiveSettings):
    """How much the image counts."""

    weight: float = number(0.1, 0.0, 1e6)


def make(options: ReconstructionOptions, inputs: ObjectiveInputs) -> Reconstruction:
    """Returns the objective of one module."""
    return Reconstruction(inputs.head, options.weight)


register_objective("reconstruction", ObjectiveKind(make, ReconstructionOptions))
