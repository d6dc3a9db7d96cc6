"""Objective `auglocal`: cross entropy behind an auxiliary network shaped like later blocks.

The auxiliary network follows Ma et al. 2024 (AugLocal), section 3. With `momentum_block` its first
block is added to a moving average of the next module's first block, as in Su et al. 2024 (MAN).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dgl_jax.config import Settings
from dgl_jax.config.fields import number, option
from dgl_jax.config.registry import OBJECTIVES
from dgl_jax.errors import UserError, explain, where
from dgl_jax.objectives.base import (
    Context,
    HiddenOptions,
    LocalLoss,
    Objective,
    ObjectiveInputs,
    ObjectiveKind,
)
from dgl_jax.objectives.classifier import Classifier, classification


class AugLocal(Objective):
    """Cross entropy of a head behind fresh blocks, which train with it and are used nowhere else.

    Attributes:
      head: Flax module called as `head(x, train)` that returns logits.
      auxiliary: the blocks in front of the head, called as `block(x, train)`.
      momentum: the next block of the network, whose moving average is applied beside the first
        auxiliary block; None for no momentum block.
      decay: decay of that moving average, see `Objective`.
      refresh: updates of the next module between two publications of its first block.
      label_smoothing: see `cross_entropy`.
    """

    head: nn.Module
    auxiliary: tuple[nn.Module, ...]
    momentum: nn.Module | None = None
    decay: float = 0.0
    refresh: int = 1
    label_smoothing: float = 0.0

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Returns `next_block` if there is a momentum block."""
        return () if self.momentum is None else ("next_block",)

    def __call__(
        self,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any],
        train: bool,
    ) -> LocalLoss:
        """Computes cross entropy and accuracy for `label`, int [B] or [B, T]; see `Objective`."""
        logits = self.predict(features, published, train)
        return classification(logits, context["label"], self.label_smoothing)

    @nn.compact
    def predict(
        self, features: Float[Array, "B ..."], published: Mapping[str, Any], train: bool
    ) -> Array:
        """Returns the logits of the head behind the auxiliary blocks.

        Raises:
          UserError: an auxiliary block cannot follow the one before it.
        """
        x = features
        for number_, block in enumerate(self.auxiliary):
            try:
                y = block(x, train)
            except (TypeError, ValueError) as error:
                # For example a shortcut without a change of channels, which a block left out made.
                raise UserError(
                    f"config.objective.name=auglocal: auxiliary block {number_} "
                    f"({type(block).__name__}) cannot follow features of shape {x.shape[1:]}: "
                    f"{explain(error) or where(error)}; a larger objective.depth, "
                    "objective.widen=1.0 or config.objective.name=classifier may fit"
                ) from error
            if number_ == 0 and self.momentum is not None and "next_block" in published:
                y += self._momentum(x, published["next_block"], train)
            x = y
        return self.head(x, train)

    def _momentum(self, x: Array, copy: Any, train: bool) -> Array:
        """Applies the moving average of the next block; gradients reach x, not the average."""
        assert self.momentum is not None
        block: Any = self.momentum.clone(parent=None)
        keys = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else None
        variables = {"params": jax.lax.stop_gradient(copy["params"])}
        if not copy["batch_stats"]:
            return block.apply(variables, x, train, rngs=keys)
        # The next module's running averages are of other inputs, so the copy has its own.
        stats = self.variable(
            "batch_stats",
            "momentum_averages",
            lambda: block.init(self.make_rng("params"), x, False)["batch_stats"],
        )
        variables["batch_stats"] = stats.value
        y, updated = block.apply(variables, x, train, mutable=["batch_stats"], rngs=keys)
        if train and not self.is_initializing():
            stats.value = updated["batch_stats"]
        return y


@dataclass(frozen=True)
class AugLocalOptions(HiddenOptions):
    """Options of the objective `auglocal`.

    Attributes:
      depth: number of auxiliary blocks, or fewer if fewer blocks follow in the network.
      pyramid: True lets the depth fall to about half of it towards the last modules.
      widen: factor of the channels of the auxiliary blocks, relative to the blocks they are shaped
        like; not of a block to which the momentum block is added.
      momentum_block: True adds to the first auxiliary block, which is then shaped like the next
        block, a moving average of the next module's first block.
      momentum: decay of this moving average, per publication.
      refresh_every: updates of the next module between two publications of its first block.
    """

    depth: int = number(2, 1, 1000)
    pyramid: bool = option(False)
    widen: float = number(1.0, 0.0, 64.0, exclusive=True)
    momentum_block: bool = option(False)
    momentum: float = number(0.995, 0.0, 0.999999, applies={"objective.momentum_block": (True,)})
    refresh_every: int = number(1, 1, 2**31 - 1, applies={"objective.momentum_block": (True,)})

    def check(self, settings: Settings) -> None:
        """Raises UserError if no auxiliary block could be widened."""
        super().check(settings)
        if self.momentum_block and self.depth == 1 and self.widen != 1.0:
            raise UserError(
                f"config.objective.widen={self.widen}: the only auxiliary block has the channels "
                "of the momentum block, to which it is added; use 1.0, or objective.depth above 1"
            )


def chosen_blocks(end: int, count: int, depth: int) -> list[int]:
    """Returns the indices of the later blocks that the auxiliary network is shaped like.

    They are spread evenly; the last one is always the last block of the network.

    Args:
      end: index of the first block after the module.
      count: number of blocks of the network, more than `end`.
      depth: number of auxiliary blocks.

    Returns:
      `depth` increasing indices, or all later ones if there are fewer.
    """
    module, later = end - 1, count - end
    depth = min(depth, later)
    return [round(module + later / depth * number_) for number_ in range(1, depth + 1)]


def pyramid_depth(depth: int, position: float) -> int:
    """Returns the depth of a pyramid, which falls linearly to about half.

    Args:
      depth: depth behind the first module.
      position: place of the module, from 0 for the first one to 1 for the last but one.
    """
    return max(1, round(depth - 0.5 * (depth - 1) * position))


def auxiliary_blocks(
    blocks: Sequence[nn.Module], end: int, indices: Sequence[int], widen: float = 1.0
) -> tuple[nn.Module, ...]:
    """Returns fresh blocks shaped like chosen later blocks of a network.

    Blocks between two chosen ones are left out, but not their reductions of height and width: an
    auxiliary block halves the map once if a block since the one before it does, and reductions that
    are left over are made up for by the next auxiliary blocks. Only blocks with a field `pool` or
    `stride` take part in this; other blocks are copied without a change.

    Args:
      blocks: all blocks of the network.
      end: index of the first block after the module.
      indices: the chosen blocks, see `chosen_blocks`.
      widen: factor of the channels (the field `features`).

    Raises:
      UserError: `widen` is not 1, and a block has no field `features`.
    """
    made, pending, before = [], 0, end
    for index in indices:
        pending += sum(_halvings(block) for block in blocks[before : index + 1])
        before = index + 1
        block = blocks[index].clone()
        fields: dict[str, Any] = {}
        if hasattr(block, "pool") and isinstance(block.pool, bool):
            fields["pool"] = pending > 0
        elif name := _stride(block)[0]:
            stride, old = 2 if pending > 0 else 1, getattr(block, name)
            fields[name] = stride if isinstance(old, int) else (stride,) * len(old)
        pending -= min(1, pending)
        if widen != 1.0:
            if not hasattr(block, "features"):
                raise UserError(
                    f"config.objective.widen={widen}: block {index} of the network is "
                    f"{type(block).__name__}, which has no field `features` to change; use 1.0"
                )
            fields["features"] = max(1, round(widen * block.features))
        made.append(block.clone(**fields))
    return tuple(made)


def _halvings(block: Any) -> int:
    if getattr(block, "pool", False) is True:
        return 1
    return round(math.log2(_stride(block)[1]))


def _stride(block: Any) -> tuple[str, int]:
    """Returns name and value of the field with a block's stride; ("", 1) if it has none."""
    for name in ("stride", "strides"):
        if stride := getattr(block, name, None):
            values = {stride} if isinstance(stride, int) else {*stride}
            if len(values) > 1:
                raise UserError(
                    f"config.objective.name=auglocal: {type(block).__name__}.{name}={stride}; the "
                    "auxiliary blocks need strides that are equal in all directions"
                )
            return name, values.pop()
    return "", 1


def _make(options: AugLocalOptions, inputs: ObjectiveInputs) -> Objective:
    blocks, end, smoothing = inputs.blocks, inputs.end, inputs.label_smoothing
    if end == len(blocks):
        return Classifier(inputs.head, smoothing)
    depth = options.depth
    if options.pyramid:
        last = inputs.modules - 2
        depth = pyramid_depth(depth, inputs.k / last if last > 0 else 0.0)
    if not options.momentum_block:
        indices = chosen_blocks(end, len(blocks), depth)
        return AugLocal(
            inputs.head,
            auxiliary_blocks(blocks, end, indices, options.widen),
            label_smoothing=smoothing,
        )
    indices = [end]
    if depth > 1 and end + 1 < len(blocks):
        indices += chosen_blocks(end + 1, len(blocks), depth - 1)
    first, *others = auxiliary_blocks(blocks, end, indices, options.widen)
    # The sum with the momentum block needs the next block's own channels.
    first = blocks[end].clone()
    return AugLocal(
        inputs.head,
        (first, *others),
        blocks[end],
        options.momentum,
        options.refresh_every,
        smoothing,
    )


OBJECTIVES.ship(auglocal=ObjectiveKind(_make, AugLocalOptions))
