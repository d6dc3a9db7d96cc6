"""What an objective is: a Flax module that makes a loss of a module's features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from dgl_jax.registry import Kind
from dgl_jax.types import Context


class LocalLoss(NamedTuple):
    """The loss of a module on a batch.

    Attributes:
      loss: a scalar to minimise.
      metrics: by name (sum, count) over the batch, so that batches of unequal weight can be averaged.
      predictions: what the module answers, such as logits; None if it answers nothing.
    """

    loss: Float[Array, ""]
    metrics: dict[str, tuple[Array, Array]]
    predictions: Array | None


class Objective(nn.Module):
    """A loss that a module minimises, and its parameters.

    Attributes:
      needs: names of the context that `__call__` reads; they travel with the activations up to the last module that asks.
      reads: names of the publications that it reads. There is `next_block`: {"params": ..., "batch_stats": ...} of the first block
        of the next module, as it was two updates ago.
      decay: of the moving average that is read in place of each publication; 0: the publication itself.
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)
    reads: ClassVar[tuple[str, ...]] = ()
    decay = 0.0  # without a type, so that a subclass may have a field of this name

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Returns the loss of a batch.

        Args:
          features: the module's activations.
          context: see `Context`.
          published: publications of other modules, by name; none for the last module, and while the cost of a module is measured.
          train: whether batch norm uses the statistics of the batch, and dropout is on.
        """
        raise NotImplementedError

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array | None:
        """Returns what the module answers, without a context; None if it answers nothing."""
        return None


def means(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics as numbers: the mean of those that are (sum, count)."""
    return {
        name: value[0] / value[1] if isinstance(value, tuple) else value
        for name, value in metrics.items()
    }


@dataclass(frozen=True)
class ObjectiveInputs:
    """What the factory of an objective is told.

    Attributes:
      k: number of the module; None while it is not decided where the network is cut, and what a module would cost is asked.
      modules: how many there are; None as well.
      blocks: all blocks of the network.
      end: number of the first block behind the module: `blocks[end:]` follow, and the module is the last one where none do.
      classes: of the data set.
      head: makes a fresh head of the configured kind, a Flax module called as `head(x, train)`; the network's classifier for the
        last module.
      dtype: of the arithmetic.
      label_smoothing: share of each target that is spread over all classes.
    """

    k: int | None
    modules: int | None
    blocks: Sequence[nn.Module]
    end: int
    classes: int
    head: nn.Module
    dtype: str = "float32"
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class ObjectiveKind(Kind):
    """An objective: `make(options, inputs)` returns an `Objective` for one module; `inputs` are `ObjectiveInputs`.

    Attributes:
      heads: it has a head, which `config.model.head` chooses.
    """

    heads: bool = True
