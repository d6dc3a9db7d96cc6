"""When a run logs, evaluates and saves."""

from dataclasses import dataclass
from typing import NamedTuple

from dgl_jax.run.build import Experiment


class Events(NamedTuple):
    """What is due at a step."""

    evaluate: bool = False
    save: bool = False


@dataclass(frozen=True)
class Due:
    """Tells what is due at which step: every so many steps, and at the last one.

    Attributes:
      log_every, evaluate_every, save_every: in updates of each module.
      total_steps: updates each module will have at the end.
    """

    log_every: int
    evaluate_every: int
    save_every: int
    total_steps: int

    @classmethod
    def of(cls, experiment: Experiment) -> "Due":
        """Reads the settings of a run, where 0 stands for an epoch."""
        settings, epoch = experiment.settings, experiment.source.steps_per_epoch
        return cls(
            log_every=settings.log.every or epoch,
            evaluate_every=settings.eval.every or epoch,
            save_every=settings.checkpoint.every or epoch,
            total_steps=experiment.total_steps,
        )

    def log(self, step: int) -> bool:
        """Tells whether the training metrics are to be written."""
        return self._at(step, self.log_every)

    def at(self, step: int) -> Events:
        """Returns what is due at a step, which is not 0."""
        return Events(self._at(step, self.evaluate_every), self._at(step, self.save_every))

    def next_event(self, step: int) -> int:
        """Returns the first step after this one at which to evaluate or to save."""
        return min(
            [self.total_steps]
            + [(step // n + 1) * n for n in (self.evaluate_every, self.save_every)]
        )

    def _at(self, step: int, every: int) -> bool:
        return step == self.total_steps or step % every == 0
