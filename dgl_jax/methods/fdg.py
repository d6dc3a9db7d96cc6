"""Fully decoupled delayed gradients (FDG) of Zhuang et al. 2021, with gradient shrinking.

Neither the forward nor the backward pass waits for another module: activations and gradients cross
one hop per tick, and all modules work in every tick. Module k updates with a gradient that is
2 (K - 1 - k) batches old, then runs the next batch forward with its new parameters. It stores only
its inputs and repeats the forward pass from them with its current parameters, so that no parameters
are stored.

A gradient that arrives from above is multiplied by `method.shrink`. The gradient that a module
sends down inherits the factor, so that module k learns from a gradient times
shrink^(K - 1 - k).

Memory: module k holds 2 (K - 1 - k) copies of its inputs, and one waiting message.
"""

from dataclasses import dataclass
from typing import ClassVar

from dgl_jax.config import Settings
from dgl_jax.config.fields import number
from dgl_jax.config.registry import METHODS
from dgl_jax.errors import UserError
from dgl_jax.methods.base import MethodKind
from dgl_jax.methods.delayed import Delayed, DelayedOptions


@dataclass(frozen=True)
class Fdg(Delayed):
    """Training rule in which neither activations nor gradients wait within a tick."""

    unlocked: ClassVar[bool] = True


@dataclass(frozen=True)
class FdgOptions(DelayedOptions):
    """Options of the method `fdg`.

    Attributes:
      shrink: factor of a gradient at each hop that it crosses; 1: none.
    """

    shrink: float = number(1.0, 0.0, 1.0)

    def check(self, settings: Settings) -> None:
        """Raises UserError if gradients shrink to 0."""
        if not self.shrink:
            raise UserError(
                "config.method.shrink=0.0: no gradient would reach any module but the last; "
                "a number above 0 is needed, such as 0.5"
            )


METHODS.ship(
    fdg=MethodKind(
        lambda options: Fdg(options.encode_gradients, shrink=options.shrink),
        FdgOptions,
        local=False,
        engines=("fused", "pipeline"),
        delayed=True,
        unlocked=True,
    )
)
