"""Input adapters, which may precede the blocks of a module in training and evaluation."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.config.registry import ADAPTERS, Kind
from dgl_jax.errors import UserError
from dgl_jax.models.blocks import conv_norm
from dgl_jax.ops import adaptive_avg_pool
from dgl_jax.types import Context

_ENCODING = 12  # channels of the first convolution of `ContextInput`


class Adapter(nn.Module):
    """Base class of layers that transform a module's inputs and train with the module.

    Attributes:
      needs: names of the context arrays that the adapter reads. In an evaluation only `image`, the
        input of the network, is available.
    """

    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __call__(
        self, inputs: Float[Array, "B ..."], context: Context, train: bool
    ) -> Float[Array, "B ..."]:
        """Transforms the inputs; an implementation must keep their shape and dtype.

        Args:
          inputs: activations of the module below, [B, ...].
          context: context arrays named in `needs`.
          train: True in training, False in evaluation, as for a block.

        Returns:
          The inputs of the module's first block.
        """
        raise NotImplementedError


class ContextInput(Adapter):
    """Adapter that adds a learned encoding of the image to the inputs (Yu et al. 2023).

    The layers are an average of the image to the size of the inputs' maps and 2 x (3x3 convolution,
    batch norm, ReLU), to 12 channels and to as many as the inputs have. The paper averages after
    the convolutions, which costs as many times more as the image has more pixels.

    Attributes:
      dtype: dtype of the arithmetic.
      ops: see `dgl_jax.ops`.
    """

    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], context: Context, train: bool
    ) -> Float[Array, "B H W C"]:
        """Returns the sum; raises UserError unless inputs and examples are maps."""
        image = jnp.asarray(context["image"])
        if inputs.ndim != 4 or image.ndim != 4:
            raise UserError(
                "config.objective.context_input: encodes images for modules that read maps "
                f"(B, H, W, C), not examples of shape {image.shape[1:]} for inputs of shape "
                f"{inputs.shape[1:]}; use False"
            )
        x = adaptive_avg_pool(image, (inputs.shape[1], inputs.shape[2]), ops=self.ops)
        for features in (_ENCODING, inputs.shape[-1]):
            x = conv_norm(x, train, features, relu=True, bias=False, dtype=self.dtype, ops=self.ops)
        return inputs + x.astype(inputs.dtype)


@dataclass(frozen=True)
class AdapterKind(Kind):
    """Registry entry of an adapter.

    `make(k, dtype)` returns the `Adapter` of module k, or None if the module has no adapter.
    """


ADAPTERS.ship(none=AdapterKind(lambda k, dtype: None))
