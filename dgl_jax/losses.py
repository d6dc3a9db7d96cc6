"""The local loss: every module minimises the cross entropy of its own head (Belilovsky et al. 2020, section 3)."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dgl_jax.packet import AnyArray


def cross_entropy(logits: Float[Array, "B C"], label: Int[AnyArray, "B"]) -> Float[Array, ""]:
    """Mean over the batch, in nats, computed in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label).mean()


def accuracy(logits: Float[Array, "B C"], label: Int[AnyArray, "B"]) -> Float[Array, ""]:
    """Fraction of the batch whose largest logit is the label's, from 0 to 1."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == label)
