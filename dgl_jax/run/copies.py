"""Snapshots of a continuous engine, which are evaluated and saved while its workers train."""

from dgl_jax.engines import EngineState, Report, counts
from dgl_jax.run.due import Due, Events
from dgl_jax.run.saver import Saver


class Copies:
    """Source of snapshots for the evaluations and checkpoints of a continuous engine.

    Takes a snapshot when an event is due and holds it until the reports have caught up with it.
    There is only one snapshot at a time, because it takes as much memory as the modules: events
    that become due while it is held are skipped.
    """

    def __init__(self, due: Due, saver: Saver):
        self._due, self._saver = due, saver
        self._pending = Events()  # due, but no snapshot taken yet
        # The snapshot that waits for the reports: its step, its state, and the events it is for.
        self._taken: tuple[int, EngineState, Events] | None = None

    def ready(self, report: Report, step: int, before: int) -> tuple[EngineState, Events] | None:
        """Returns a snapshot at `step` and the events to handle with it; None if there is none.

        Args:
          report: the newest report.
          step: step that the run has reached with this report.
          before: step that the run had reached with the previous report.
        """
        if self._taken is None and step > before:
            self._pending = self._due.at(step)
        if any(self._pending) and report.step >= step:
            snapshot = report.snapshot(flight=self._pending.save and self._saver.takes_flight(step))
            reached = min(counts(snapshot))
            # A module restarted meanwhile is behind: try again once it has caught up.
            if reached >= step:
                self._taken, self._pending = (reached, snapshot, self._pending), Events()
        # The snapshot may be ahead of the reports. It waits for them, so that metrics and
        # checkpoints appear in order and under the step at which they were taken.
        if self._taken is None or step < self._taken[0]:
            return None
        (_, snapshot, events), self._taken = self._taken, None
        return snapshot, events
