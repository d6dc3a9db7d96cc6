"""Saves what a run can go on from, and nothing that has diverged."""

import dataclasses

from dgl_jax.core.module import ModuleState
from dgl_jax.engines import EngineState
from dgl_jax.run.begin import Begun
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints, all_finite
from dgl_jax.run.metrics import diverged
from dgl_jax.run.record import Record


class Saver:
    """Decides what goes into a checkpoint, and gives single modules back from the newest one."""

    def __init__(
        self, experiment: Experiment, checkpoints: Checkpoints, record: Record, begun: Begun
    ):
        self.experiment, self.checkpoints, self.record = experiment, checkpoints, record
        self._saved = (
            begun.step
        )  # the step of the newest checkpoint; at step 0 there is nothing to save
        self._flight_saved = (
            begun.step if begun.flight else -1
        )  # and of the newest with what was under way

    def save(self, step: int, state: EngineState) -> None:
        """Saves a state under its step, unless that is done; returns before everything is on the disk.

        Raises:
          UserError: a loss or a parameter is not finite; nothing is saved then.
        """
        if step == self._saved:
            return
        experiment = self.experiment
        meta = self.record.meta() | {
            "dataset": dataclasses.asdict(experiment.info),
            "first_blocks": [module.first for module in experiment.spec.modules],
            "total_steps": experiment.total_steps,
        }
        for k, ok in enumerate(all_finite(state)):
            if not ok:
                raise diverged(f"a parameter of module_{k} is not finite at step {step}")
        flight = None
        if state.flight is not None and self.takes_flight(step):
            flight, self._flight_saved = state.flight.snapshot(), step
        accuracy = self.record.value(
            f"validation/{experiment.spec.modules[-1].name}/accuracy", step
        )
        self.checkpoints.save(step, state, meta, accuracy, flight)
        self._saved = step

    def takes_flight(self, step: int) -> bool:
        """Tells whether a checkpoint of this step holds what is under way, which is large."""
        every = self.experiment.settings.checkpoint.replay_every
        return bool(every) and (self._flight_saved < 0 or step - self._flight_saved >= every)

    def recover(self, k: int) -> ModuleState | None:
        """Reads module k, and no other, from the newest checkpoint; returns None if there is none."""
        self.checkpoints.finish()
        if not self.checkpoints.steps():
            return None
        spec, placement = self.experiment.spec, self.experiment.engine.placement
        return self.checkpoints.restore_module(k, lambda _: (spec.abstract_states(), placement))
