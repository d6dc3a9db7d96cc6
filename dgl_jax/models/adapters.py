"""Input adapters: what may stand in front of a module's blocks, in training and in evaluation."""

from dataclasses import dataclass
from typing import ClassVar

from flax import linen as nn
from jaxtyping import Array, Float

from dgl_jax.registry import ADAPTERS, Kind
from dgl_jax.types import Context


class Adapter(nn.Module):
    """Changes what a module reads; trains with the module.

    Attributes:
      needs: names of the context that it reads. Only `image` is there in an evaluation: the input of the network.
    """

    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __call__(
        self, inputs: Float[Array, "B ..."], context: Context, train: bool
    ) -> Float[Array, "B ..."]:
        """Returns what the blocks read, of the shape and type of the inputs.

        Args:
          inputs: what the module below handed on.
          context: see `needs`.
          train: as for a block.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AdapterKind(Kind):
    """An adapter: `make(k, dtype)` returns the `Adapter` of module k; None: it has none."""


ADAPTERS.ship(none=AdapterKind(lambda k, dtype: None))
