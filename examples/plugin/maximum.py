"""Head that takes the maximum of each channel and applies a linear layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dgl_jax.models import HeadKind, register_head


class MaximumHead(nn.Module):
    """Maximum over all positions, followed by a linear layer in float32."""

    num_classes: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"], train: bool) -> Float[Array, "B classes"]:
        """Returns one row of logits per example."""
        return nn.Dense(self.num_classes)(x.max(tuple(range(1, x.ndim - 1))).astype(jnp.float32))


register_head("maximum", HeadKind(MaximumHead))
