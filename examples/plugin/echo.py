"""An input adapter: every module adds a small learnt encoding of the image to what it reads, in training and in evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dgl_jax.models import Adapter, AdapterKind, register_adapter
from dgl_jax.types import Context


class Echo(Adapter):
    """Adds a 1x1 convolution of the image, averaged to the size of the map; it begins at zero, where nothing is added."""

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], context: Context, train: bool
    ) -> Float[Array, "B H W C"]:
        """Returns what the blocks read."""
        image = jnp.asarray(context["image"])
        small = jax.image.resize(
            image, (*inputs.shape[:-1], image.shape[-1]), "linear", antialias=True
        )
        drawn = nn.Dense(inputs.shape[-1], kernel_init=nn.initializers.zeros, name="draw")(small)
        return inputs + drawn.astype(inputs.dtype)


def make(k: int, dtype: str) -> Echo | None:
    """Returns the adapter of module k; the first one reads the image itself."""
    return Echo() if k else None


register_adapter("echo", AdapterKind(make))
