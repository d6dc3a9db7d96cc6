"""Copies of the modules of a continuous engine: evaluated and saved while its workers go on."""

from dgl_jax.engines import EngineState, Report, counts
from dgl_jax.run.due import Due, Events
from dgl_jax.run.saver import Saver


class Copies:
    """Takes a copy when something is due, and keeps it until the reports have caught up with it.

    What comes due while a copy is kept is left out: there is one copy at a time, which takes as much memory as the modules.
    """

    def __init__(self, due: Due, saver: Saver):
        self._due, self._saver = due, saver
        self._wanted = Events()  # what no copy was taken for yet
        self._taken: tuple[int, EngineState, Events] | None = None  # its step, and what it is for

    def ready(self, report: Report, step: int, before: int) -> tuple[EngineState, Events] | None:
        """Returns a copy that is at `step`, and what is to be done with it; None if there is none now.

        Args:
          report: the newest one.
          step: the step that the run has reached by it.
          before: and by the report before.
        """
        if self._taken is None and step > before:
            self._wanted = self._due.at(step)
        if any(self._wanted) and report.step >= step:
            copy = report.snapshot(flight=self._wanted.save and self._saver.takes_flight(step))
            reached = min(counts(copy))
            # A module that was restarted meanwhile is behind: another copy is made once it has caught up.
            if reached >= step:
                self._taken, self._wanted = (reached, copy, self._wanted), Events()
        # The copy may be ahead of the reports: it is used once they have caught up, under its true step.
        if self._taken is None or step < self._taken[0]:
            return None
        (_, copy, events), self._taken = self._taken, None
        return copy, events
