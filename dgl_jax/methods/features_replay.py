"""Features replay (FR) of Huo et al. 2018, "Training Neural Networks Using Features Replay".

The schedule is the same as for `ddg`: a module updates with a gradient that is K - 1 - k batches
old. It stores only its inputs and repeats the forward pass from them with its current parameters.
The running averages of batch norm are updated in the first pass only.

Memory: module k holds K - k copies of its inputs.
"""

from dataclasses import dataclass

from dgl_jax.config.fields import number
from dgl_jax.config.registry import METHODS
from dgl_jax.methods.base import MethodKind
from dgl_jax.methods.delayed import Delayed, DelayedOptions


@dataclass(frozen=True)
class FeaturesReplay(Delayed):
    """Training rule with delayed gradients on stored inputs at the current parameters."""


@dataclass(frozen=True)
class FeaturesReplayOptions(DelayedOptions):
    """Options of the method `features_replay`.

    Attributes:
      first_rate: factor of the first module's learning rate, if there are several modules; the
        authors' code uses 2.
    """

    first_rate: float = number(1.0, 0.0, 100.0, exclusive=True)


METHODS.ship(
    features_replay=MethodKind(
        lambda options: FeaturesReplay(options.encode_gradients, options.first_rate),
        FeaturesReplayOptions,
        local=False,
        engines=("fused", "pipeline"),
        delayed=True,
    )
)
