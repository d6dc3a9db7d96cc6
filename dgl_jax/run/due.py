"""Steps at which a run logs, evaluates and saves checkpoints."""

from dataclasses import dataclass
from typing import NamedTuple

from dgl_jax.config import Settings


class Events(NamedTuple):
    """Events that are due at a step."""

    evaluate: bool = False
    save: bool = False
    probe: bool = False


@dataclass(frozen=True)
class Due:
    """Schedule of the events of a run; all of them are also due at the last step.

    Attributes:
      log_every: updates per module between two records of the training metrics.
      evaluate_every: updates per module between two evaluations.
      save_every: updates per module between two checkpoints.
      total_steps: number of updates that every module has at the end.
      probe_every: updates per module between two probes of the diagnostics; 0: there are none.
      probe_apart: False postpones each probe to the next evaluation or checkpoint, because the
        engine groups steps into dispatches: another stop would change the groups and the rounding.
    """

    log_every: int
    evaluate_every: int
    save_every: int
    total_steps: int
    probe_every: int = 0
    probe_apart: bool = True

    @classmethod
    def of(cls, settings: Settings, epoch: int, total_steps: int, apart: bool = True) -> "Due":
        """Returns the schedule of a run; intervals of 0 become `epoch`, the steps per epoch."""
        probes = settings.diagnostics
        return cls(
            log_every=settings.log.every or epoch,
            evaluate_every=settings.eval.every or epoch,
            save_every=settings.checkpoint.every or epoch,
            total_steps=total_steps,
            probe_every=probes.every if probes.enabled else 0,
            probe_apart=apart,
        )

    def log(self, step: int) -> bool:
        """Returns True if the training metrics are due at `step`."""
        return self._at(step, self.log_every)

    def at(self, step: int) -> Events:
        """Returns the events that are due at `step`, which must be positive."""
        evaluate, save = self._at(step, self.evaluate_every), self._at(step, self.save_every)
        return Events(evaluate, save, self._probe(step))

    def next_event(self, step: int) -> int:
        """Returns the first step after `step` with an evaluation, a checkpoint or a probe."""
        every = [self.evaluate_every, self.save_every]
        if self.probe_every and self.probe_apart:
            every.append(self.probe_every)
        return min([self.total_steps] + [(step // n + 1) * n for n in every])

    def _probe(self, step: int) -> bool:
        if not self.probe_every:
            return False
        if self.probe_apart:
            return self._at(step, self.probe_every)
        stops = self.evaluate_every, self.save_every
        before = max((step - 1) // n * n for n in stops)
        stop = any(self._at(step, n) for n in stops)
        due = step == self.total_steps or step // self.probe_every > before // self.probe_every
        return stop and due

    def _at(self, step: int, every: int) -> bool:
        return step == self.total_steps or step % every == 0
