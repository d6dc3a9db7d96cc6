"""Transport cost: a penalty on the residuals of a module, beside any objective."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dgl_jax.objectives.base import Context, Exchange, LocalLoss, Objective

RESIDUAL = "residual"  # name under which blocks sow what they add to their inputs


class Transport(Objective):
    """An objective plus `weight` x the squared residuals of the module's blocks.

    The residual of a block is what it adds to its inputs, so that the penalty is small for modules
    that move their inputs little (Karkar et al. 2023). Its squares are averaged over all values of
    the batch and summed over the blocks. Blocks that sow no `residual`, or whose outputs have
    another shape than their inputs, do not count.

    Attributes:
      inner: the other objective.
      weight: weight of the penalty. The paper sums the squares of an example, so that its
        1 / (2 tau) is `weight` divided by the number of values of a residual.
    """

    inner: Objective
    weight: float

    def setup(self) -> None:
        """Shares this module's scope with the other objective: parameter paths stay the same."""
        nn.share_scope(self, self.inner)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Returns what the other objective needs."""
        return self.inner.needs

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Returns `intermediates` and what the other objective reads."""
        return tuple(dict.fromkeys((*self.inner.reads, "intermediates")))

    @property
    def refresh(self) -> int:  # type: ignore[override]
        """Returns the period of publications for the other objective."""
        return self.inner.refresh

    @property
    def decay(self) -> float:  # type: ignore[override]
        """Returns the decay of the other objective."""
        return self.inner.decay

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Computes the loss, with the metric `transport` (the penalty without its weight)."""
        local = self.inner(features, context, published, train)
        penalty, count = jnp.float32(0), jnp.float32(len(features))
        for residual in residuals(published.get("intermediates", {})):
            penalty += jnp.mean(jnp.square(residual.astype(jnp.float32)))
        loss = local.loss + self.weight * penalty
        metrics = {"loss": (loss * count, count), "transport": (penalty * count, count)}
        return LocalLoss(loss, local.metrics | metrics, local.predictions)

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array | None:
        """Returns the predictions of the other objective."""
        return self.inner.predict(features, published, train)

    def exchange(self, features: jax.ShapeDtypeStruct) -> Exchange:
        """Returns what the other objective exchanges."""
        return self.inner.exchange(features)


def residuals(intermediates: Mapping[str, Any]) -> list[Array]:
    """Returns the residuals among what the blocks of a module sow, in the order of the blocks."""
    return [
        residual
        for sown in intermediates.values()
        if isinstance(sown, Mapping)
        for residual in jax.tree.leaves(sown.get(RESIDUAL, ()))
    ]
