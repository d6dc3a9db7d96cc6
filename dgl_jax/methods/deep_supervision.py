"""Deep supervision: backpropagation through the whole network with the losses of all heads.

The heads are the same as in decoupled training, but no gradient is cut: each block learns from its
own module's loss and from the losses of all modules above. Compared with `dgl`, the method
therefore separates the effect of the heads from the effect of the cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgl_jax.config import MethodSettings
from dgl_jax.config.fields import number
from dgl_jax.config.registry import METHODS
from dgl_jax.core.module import ModuleState
from dgl_jax.errors import UserError
from dgl_jax.methods.backprop import Backprop
from dgl_jax.methods.base import MethodKind
from dgl_jax.spec import TrainSpec


@dataclass(frozen=True)
class DeepSupervision(Backprop):
    """Backpropagation of the last module's loss plus `weight` times the sum of the others."""

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns an empty dict, after a check that the objectives need no publications.

        Raises:
          UserError: an objective reads the first block of the next module.
        """
        if "next_block" in spec.reads(k):
            raise UserError(
                "config.method.name=deep_supervision: its objectives cannot read the next module's "
                f"first block, as that of module_{k} does; use another objective (auglocal "
                "without momentum_block), or config.method.name=dgl"
            )
        return {}


@dataclass(frozen=True)
class DeepSupervisionOptions(MethodSettings):
    """Options of deep supervision.

    Attributes:
      weight: factor of the losses of all modules but the last.
    """

    weight: float = number(0.3, 0.0, 1e6)


METHODS.ship(
    deep_supervision=MethodKind(
        lambda options: DeepSupervision(options.weight), DeepSupervisionOptions, engines=("fused",)
    )
)
