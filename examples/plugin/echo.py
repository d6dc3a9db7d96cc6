"""Input adapter that adds a small learned encoding of the image to each module's inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dgl_jax.models import Adapter, AdapterKind, register_adapter
from dgl_jax.types import Context


class Echo(Adapter):
    """Adds a 1x1 convolution of the image, downsampled to the size of the feature map.

    The kernel is initialized to zero, so the adapter adds nothing at the start of training. It is
    active in training and in evaluation.
    """

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], context: Context, train: bool
    ) -> Float[Array, "B H W C"]:
        """Returns the inputs of the module's blocks."""
        image = jnp.asarray(context["image"])
        small = jax.image.resize(
            image, (*inputs.shape[:-1], image.shape[-1]), "linear", antialias=True
        )
        encoding = nn.Dense(inputs.shape[-1], kernel_init=nn.initializers.zeros, name="draw")(small)
        return inputs + encoding.astype(inputs.dtype)


def make(k: int, dtype: str) -> Echo | None:
    """Returns the adapter of module k; None for the first module, whose input is the image."""
    return Echo() if k else None


register_adapter("echo", AdapterKind(make))
