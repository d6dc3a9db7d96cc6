"""Steps at which a run logs, evaluates and saves checkpoints."""

from dataclasses import dataclass
from typing import NamedTuple

from dgl_jax.config import Settings


class Events(NamedTuple):
    """Events that are due at a step."""

    evaluate: bool = False
    save: bool = False


@dataclass(frozen=True)
class Due:
    """Schedule of the events of a run; all of them are also due at the last step.

    Attributes:
      log_every: updates per module between two records of the training metrics.
      evaluate_every: updates per module between two evaluations.
      save_every: updates per module between two checkpoints.
      total_steps: number of updates that every module has at the end.
    """

    log_every: int
    evaluate_every: int
    save_every: int
    total_steps: int

    @classmethod
    def of(cls, settings: Settings, epoch: int, total_steps: int) -> "Due":
        """Returns the schedule of a run; intervals of 0 become `epoch`, the steps per epoch."""
        return cls(
            log_every=settings.log.every or epoch,
            evaluate_every=settings.eval.every or epoch,
            save_every=settings.checkpoint.every or epoch,
            total_steps=total_steps,
        )

    def log(self, step: int) -> bool:
        """Returns True if the training metrics are due at `step`."""
        return self._at(step, self.log_every)

    def at(self, step: int) -> Events:
        """Returns the events that are due at `step`, which must be positive."""
        return Events(self._at(step, self.evaluate_every), self._at(step, self.save_every))

    def next_event(self, step: int) -> int:
        """Returns the first step after `step` with an evaluation or a checkpoint."""
        return min(
            [self.total_steps]
            + [(step // n + 1) * n for n in (self.evaluate_every, self.save_every)]
        )

    def _at(self, step: int, every: int) -> bool:
        return step == self.total_steps or step % every == 0
