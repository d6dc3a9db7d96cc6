"""Input adapters, which may precede the blocks of a module in training and evaluation."""

from dataclasses import dataclass
from typing import ClassVar

from flax import linen as nn
from jaxtyping import Array, Float

from dgl_jax.registry import ADAPTERS, Kind
from dgl_jax.types import Context


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


@dataclass(frozen=True)
class AdapterKind(Kind):
    """Registry entry of an adapter.

    `make(k, dtype)` returns the `Adapter` of module k, or None if the module has no adapter.
    """


ADAPTERS.ship(none=AdapterKind(lambda k, dtype: None))
