"""The local loss: every module minimises the cross entropy of its own head (Belilovsky et al. 2020, section 3)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dgl_jax.types import AnyArray


def cross_entropy(logits: Float[Array, "B C"], label: Int[AnyArray, " B"], smoothing: float = 0.0) -> Float[Array, ""]:
    """Mean over the batch, in nats, computed in float32.

    Args:
      smoothing: share of each target that is spread evenly over all C classes, its own included (Szegedy et al. 2016, section 7).
    """
    logits = logits.astype(jnp.float32)
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    targets = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def accuracy(logits: Float[Array, "B C"], label: Int[AnyArray, " B"]) -> Float[Array, ""]:
    """Fraction of the batch whose largest logit is the label's, from 0 to 1."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == label)
