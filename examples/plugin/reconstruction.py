"""Objective that reads the image: cross entropy of a head plus an image reconstruction error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
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


class Reconstruction(Objective):
    """Cross entropy plus `weight` times the mean squared error of a reconstructed image.

    One 1x1 convolution reconstructs the image from the features. The target is the image
    downsampled to the size of the feature map, because pooled features cannot contain finer detail.

    Attributes:
      head: Flax module called as `head(x, train)`.
      weight: weight of the reconstruction error.
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
        """Computes the loss with `accuracy` and `reconstruction` (the error); see `Objective`."""
        image, classified = (
            context["image"],
            classification(self.head(features, train), context["label"]),
        )
        reconstructed = nn.Dense(image.shape[-1], name="draw")(features)
        small = jax.image.resize(image, reconstructed.shape, "linear", antialias=True)
        error, count = jnp.mean(jnp.square(reconstructed - small)), jnp.float32(len(image))
        loss = classified.loss + self.weight * error
        local_metrics = {"loss": (loss * count, count), "reconstruction": (error * count, count)}
        return LocalLoss(loss, classified.metrics | local_metrics, classified.predictions)

    def predict(
        self, features: Float[Array, "B H W C"], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits of the head."""
        return self.head(features, train)


@dataclass(frozen=True)
class ReconstructionOptions(ObjectiveSettings):
    """Options of the objective `reconstruction`: the weight of the error."""

    weight: float = number(0.1, 0.0, 1e6)


def make(options: ReconstructionOptions, inputs: ObjectiveInputs) -> Reconstruction:
    """Returns the objective of one module, with the configured weight."""
    return Reconstruction(inputs.head, options.weight)


register_objective("reconstruction", ObjectiveKind(make, ReconstructionOptions))
