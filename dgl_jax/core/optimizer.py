"""Optimizers and learning-rate schedules.

All modules share one optimizer; each has its own optimizer state and counts its own updates.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgl_jax.config import OptimizerSettings, ScheduleSettings
from dgl_jax.config.fields import number, option
from dgl_jax.config.registry import OPTIMIZERS, SCHEDULES, Kind
from dgl_jax.core.program_cache import cached_program
from dgl_jax.errors import UserError


@dataclass(frozen=True)
class OptimizerKind(Kind):
    """Registry entry of an optimizer.

    `make(options, schedule)` returns an `optax.GradientTransformation`. Weight decay is not its
    task: `make_optimizer` adds it to the gradient first.

    Attributes:
      elementwise: the update of a value depends on no other values of its array, so that the
        parameters of a module may be joined to one vector (`config.optimizer.flat`).
    """

    elementwise: bool = False


@dataclass(frozen=True)
class SgdOptions(OptimizerSettings):
    """Options of stochastic gradient descent.

    Attributes:
      momentum: decay of the momentum; 0 for none.
      nesterov: use Nesterov's variant of momentum.
    """

    momentum: float = number(0.9, 0.0, 1.0)
    nesterov: bool = option(False)


@dataclass(frozen=True)
class ScheduleKind(Kind):
    """Registry entry of a learning-rate schedule.

    `make(options, learning_rate, steps_per_epoch, steps)` returns an `optax.Schedule` over `steps`
    updates.

    Attributes:
      whole: the schedule depends on the length of the run, so that a longer run differs from its
        first update on.
    """

    whole: bool = False


@dataclass(frozen=True)
class StepOptions(ScheduleSettings):
    """Options of a piecewise constant learning rate.

    Attributes:
      boundaries: epochs after which the rate is multiplied by `factor`.
      factor: factor that the rate is multiplied by at each boundary.
    """

    boundaries: tuple[float, ...] = option((15.0, 30.0, 45.0))
    factor: float = number(0.2, 0.0, 1.0)

    def check(self, settings: object) -> None:
        """Raises UserError if the boundaries are not positive and increasing."""
        if list(self.boundaries) != sorted(set(self.boundaries)) or any(
            not 0 < b <= 1e6 for b in self.boundaries
        ):
            raise UserError(
                f"config.schedule.boundaries={self.boundaries}: epochs must be positive and "
                "increasing, at most a million"
            )


def make_schedule(
    options: ScheduleSettings, learning_rate: float, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made so far.

    The warm-up rises linearly and reaches the full rate at its last update.

    Args:
      options: the `schedule` group of the configuration.
      learning_rate: the full rate.
      steps_per_epoch: updates per epoch, which convert the epochs in `options` to updates.
      total_steps: updates of the whole run, including the warm-up.
    """
    # Most schedules ignore the length of the run; passing 0 lets runs of any length share one
    # cached schedule.
    return _schedule(
        options, learning_rate, steps_per_epoch, total_steps if SCHEDULES[options.name].whole else 0
    )


@cached_program(32)
def _schedule(
    options: ScheduleSettings, learning_rate: float, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    warmup = round(options.warmup_epochs * steps_per_epoch)
    kind = SCHEDULES[options.name]
    main = kind.make(options, learning_rate, steps_per_epoch, total_steps - warmup)
    if not warmup:
        return main
    # A schedule of the whole run starts after the warm-up. Boundaries count from the first update.
    begin = warmup if kind.whole else 0
    return lambda count: (
        main(jnp.maximum(count - begin, 0)) * jnp.minimum((count + 1) / warmup, 1.0)
    )


@cached_program(32)
def make_optimizer(
    options: OptimizerSettings, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer, with weight decay added to the gradients of all parameters.

    Args:
      options: the `optimizer` group of the configuration.
      schedule: learning rate by number of updates; by default it is 0.
    """
    schedule = schedule or optax.constant_schedule(0.0)
    decay = (
        optax.add_decayed_weights(options.weight_decay)
        if options.weight_decay
        else optax.identity()
    )
    optimizer = optax.chain(decay, OPTIMIZERS[options.name].make(options, schedule))
    return _flattened(optimizer) if options.flat else optimizer


def _flattened(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Joins all arrays to one vector with `optax.flatten`, which cannot join none at all."""
    flat = optax.flatten(optimizer)

    def chosen(tree: Any) -> optax.GradientTransformation:
        return flat if jax.tree.leaves(tree) else optimizer

    return optax.GradientTransformation(
        lambda params: chosen(params).init(params),
        lambda updates, state, params=None: chosen(updates).update(updates, state, params),
    )


def _constant(
    options: ScheduleSettings, learning_rate: float, steps_per_epoch: int, steps: int
) -> optax.Schedule:
    return optax.constant_schedule(learning_rate)


def _step(
    options: StepOptions, learning_rate: float, steps_per_epoch: int, steps: int
) -> optax.Schedule:
    """Multiplies the rate by `factor` at each boundary."""
    boundaries: dict[int, float] = {}
    for epoch in options.boundaries:
        step = round(epoch * steps_per_epoch)
        # Multiply, as two boundaries may round to the same step.
        boundaries[step] = boundaries.get(step, 1.0) * options.factor
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def _cosine(
    options: ScheduleSettings, learning_rate: float, steps_per_epoch: int, steps: int
) -> optax.Schedule:
    """Decays the rate along a cosine, to 0 at the end of the run."""
    return optax.cosine_decay_schedule(learning_rate, max(1, steps))


def _sgd(options: SgdOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(schedule, momentum=options.momentum or None, nesterov=options.nesterov)


SCHEDULES.ship(
    constant=ScheduleKind(_constant),
    step=ScheduleKind(_step, StepOptions),
    cosine=ScheduleKind(_cosine, whole=True),
)
OPTIMIZERS.ship(
    sgd=OptimizerKind(_sgd, SgdOptions, elementwise=True),
    adam=OptimizerKind(lambda options, schedule: optax.adam(schedule), elementwise=True),
)
register_schedule, register_optimizer = SCHEDULES.register, OPTIMIZERS.register
