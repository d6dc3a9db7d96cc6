"""Optimizers and learning-rate schedules; each module holds an optimizer state of its own and counts its own updates."""

import jax.numpy as jnp
import optax

from dgl_jax.config import OptimizerSettings, ScheduleSettings
from dgl_jax.core.kept import kept


def make_schedule(settings: ScheduleSettings, learning_rate: float, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    `step` multiplies by `factor` from the first update after each boundary on; `cosine` falls to 0 at `total_steps`; a warm-up
    rises linearly over its epochs and reaches the full rate at its last update.
    """
    return _schedule(settings, learning_rate, steps_per_epoch, total_steps if settings.name == "cosine" else 0)


@kept(32)
def _schedule(settings: ScheduleSettings, learning_rate: float, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if settings.name == "constant":
        main = optax.constant_schedule(learning_rate)
    elif settings.name == "step":
        boundaries: dict[int, float] = {}
        for epoch in settings.boundaries:  # two that round to one step count twice
            step = round(epoch * steps_per_epoch)
            boundaries[step] = boundaries.get(step, 1.0) * settings.factor
        main = optax.piecewise_constant_schedule(learning_rate, boundaries)
    else:
        cosine = optax.cosine_decay_schedule(learning_rate, max(1, total_steps - warmup))

        def main(count):
            return cosine(jnp.maximum(count - warmup, 0))

    if not warmup:
        return main
    return lambda count: main(count) * jnp.minimum((count + 1) / warmup, 1.0)


@kept(32)
def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum (also Nesterov's), or Adam; weight decay is added to the gradient of every parameter, as in the paper."""
    decay = optax.add_decayed_weights(settings.weight_decay) if settings.weight_decay else optax.identity()
    if settings.name == "adam":
        return optax.chain(decay, optax.adam(schedule))
    return optax.chain(decay, optax.sgd(schedule, momentum=settings.momentum or None, nesterov=settings.nesterov))
