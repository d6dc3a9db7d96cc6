"""Interface of objectives: Flax modules that compute a local loss from a module's features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dgl_jax.config import ObjectiveSettings, Settings
from dgl_jax.config.registry import METHODS, Kind
from dgl_jax.errors import UserError
from dgl_jax.types import Context


class LocalLoss(NamedTuple):
    """Loss, metrics and predictions of one module on one batch.

    Attributes:
      loss: scalar to minimize.
      metrics: (sum, count) over the batch by name, so that averages over batches are weighted by
        count.
      predictions: prediction of the module, such as logits; None if it makes none.
    """

    loss: Float[Array, ""]
    metrics: dict[str, tuple[Array, Array]]
    predictions: Array | None


class Exchange(NamedTuple):
    """Lists what a group of devices exchanges for a loss that compares the examples of a batch.

    Attributes:
      summed: bytes of each array that they add up.
      gathered: bytes of each array of which every device gets a whole copy.
    """

    summed: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()


class Objective(nn.Module):
    """Local loss of a module, together with its own parameters (such as those in a head).

    Attributes:
      needs: names of the context arrays that `__call__` reads. They travel with the activations up
        to the last module that needs them.
      reads: names of what the objective reads in `published`. `next_block` is a publication of the
        next module: {"params": ..., "batch_stats": ...} of its first block, at least two updates
        old under synchronous engines; asynchronous ones hand over the last publication but one.
        `intermediates` holds what the module's blocks sow on the same batch (`nn.Module.sow` into
        the collection "intermediates"), as {"block_0": {name: values}, ...}; gradients reach the
        blocks through it.
      decay: decay of the moving average that is read in place of a publication; 0 reads the
        publication itself.
      refresh: updates of the next module between two publications.
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)
    reads: ClassVar[tuple[str, ...]] = ()
    # No annotations, hence no dataclass fields: a subclass may declare fields of these names.
    decay = 0.0
    refresh = 1

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Computes the loss of a batch.

        Args:
          features: activations of the module, [B, ...].
          context: arrays with one row per example, by name.
          published: what `reads` names. Without `next_block` for the last module, and without
            `intermediates` while the cost of an objective is measured.
          train: True if batch norm uses the statistics of the batch and dropout is active.

        Returns:
          The loss, metrics and predictions of the batch.
        """
        raise NotImplementedError

    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array | None:
        """Returns predictions from the features alone (no context); None if there are none."""
        return None

    def exchange(self, features: jax.ShapeDtypeStruct) -> Exchange:
        """Returns what a group of devices exchanges per step, apart from gradients and batch norm.

        `--mode=plan` adds its duration. A mean over examples needs nothing, which is the default.

        Args:
          features: shape and dtype of the module's activations, [B, ...].
        """
        return Exchange()


def means(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Converts metrics to numbers: each (sum, count) becomes its mean, other values stay."""
    return {
        name: value[0] / value[1] if isinstance(value, tuple) else value
        for name, value in metrics.items()
    }


@dataclass(frozen=True)
class ObjectiveInputs:
    """Arguments of an objective's factory.

    Attributes:
      k: index of the module. Before the network is cut, the factory is also called for other ends
        of the module, to choose the cuts by cost.
      modules: number of modules.
      blocks: all blocks of the network.
      end: index of the first block after the module. `blocks[end:]` follow it; if there are none,
        the module is the last one.
      classes: number of classes of the data set.
      head: fresh head of the configured kind, a Flax module called as `head(x, train)`; the
        network's classifier for the last module.
      dtype: dtype of the computation.
      label_smoothing: share of each target that is spread over all classes.
      make_head: returns a fresh head of the configured kind with that many outputs.
      ops: formulation of the operations, see `dgl_jax.ops`.
      mean: mean of each channel by which images were normalized; empty for other examples.
      std: standard deviation of each channel, likewise.
    """

    k: int
    modules: int
    blocks: Sequence[nn.Module]
    end: int
    classes: int
    head: nn.Module
    dtype: str = "float32"
    label_smoothing: float = 0.0
    make_head: Callable[[int], nn.Module] | None = None
    ops: str = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class HiddenOptions(ObjectiveSettings):
    """Base class of the options of objectives that every module but the last one has.

    The last module minimizes the cross entropy of the network's classifier.
    """

    def check(self, settings: Settings) -> None:
        """Raises UserError if the method trains without local objectives."""
        super().check(settings)
        if not METHODS[settings.method.name].local:
            raise UserError(
                f"config.objective.name={self.name}: has no effect under config.method.name="
                f"{settings.method.name}, where only the last module has an objective; use "
                "classifier"
            )


def refuse_micro_batches(settings: Settings, name: str) -> None:
    """Raises UserError if batches are split although an objective compares all their examples.

    A single module does not use the objective.

    Args:
      settings: the settings of the run.
      name: the objective, for the message.
    """
    if settings.train.accumulate > 1 and settings.model.modules > 1:
        raise UserError(
            f"config.train.accumulate={settings.train.accumulate}: config.objective.name={name} "
            "compares all examples of a batch and cannot be computed in micro-batches; use 1, or "
            "config.model.remat=True for less memory"
        )


@dataclass(frozen=True)
class ObjectiveKind(Kind):
    """Registry entry of an objective.

    `make(options, inputs)` returns the `Objective` of one module; `inputs` is an `ObjectiveInputs`.

    Attributes:
      heads: True if the objective has a head, which `config.model.head` chooses.
    """

    heads: bool = True
