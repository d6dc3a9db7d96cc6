"""Saving of checkpoints during a run; a diverged state is never saved."""

import dataclasses

from dgl_jax.core.module import ModuleState
from dgl_jax.engines import EngineState, counts
from dgl_jax.run.arrays import all_finite, collected
from dgl_jax.run.begin import RunStart
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.metrics import diverged
from dgl_jax.run.record import Record


class Saver:
    """Writer of a run's checkpoints; also restores single modules from the newest one."""

    def __init__(
        self, experiment: Experiment, checkpoints: Checkpoints, record: Record, start: RunStart
    ):
        self.experiment, self.checkpoints, self.record = experiment, checkpoints, record
        # Step of the newest checkpoint. A new run counts as saved at step 0: nothing to save yet.
        self._saved = start.step
        # Step of the newest checkpoint that holds the in-flight state; -1 if there is none.
        self._flight_saved = start.step if start.flight else -1

    def save(self, step: int, state: EngineState) -> None:
        """Starts to save a checkpoint, unless one of this step exists; see `Checkpoints.save`.

        Args:
          step: step of the checkpoint.
          state: state of the run.

        Raises:
          UserError: a loss or a parameter is not finite (nothing is saved), or the checkpoint
            cannot be written.
        """
        if step == self._saved:
            return
        experiment = self.experiment
        meta = self.record.meta() | {
            "dataset": dataclasses.asdict(experiment.info),
            "first_blocks": [module.first for module in experiment.spec.modules],
            "total_steps": experiment.total_steps,
        }
        updates = counts(state)
        state = collected(state, experiment.engine.placement)
        for k, ok in enumerate(all_finite(state)):
            if not ok:
                raise diverged(f"a parameter of module_{k} is not finite at step {step}")
        flight = None
        if state.flight is not None and self.takes_flight(step):
            flight, self._flight_saved = state.flight.snapshot(), step
        accuracy = None
        # Chance must not be the best, so accuracy counts from the last module's first update on.
        if updates[-1]:
            accuracy = self.record.value(
                f"validation/{experiment.spec.modules[-1].name}/accuracy", step
            )
        self.checkpoints.save(step, state, meta, accuracy, flight)
        self._saved = step

    def takes_flight(self, step: int) -> bool:
        """Returns True if a checkpoint at `step` stores the in-flight state, which is large."""
        every = self.experiment.settings.checkpoint.replay_every
        return bool(every) and (self._flight_saved < 0 or step - self._flight_saved >= every)

    def recover(self, k: int) -> ModuleState | None:
        """Restores only module k from the newest checkpoint; returns None if there is none."""
        self.checkpoints.finish()
        if not self.checkpoints.steps():
            return None
        spec, placement = self.experiment.spec, self.experiment.engine.placement
        return self.checkpoints.restore_module(k, lambda _: (spec.abstract_states(), placement))
