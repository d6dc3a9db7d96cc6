"""Meter of the training throughput in images per second."""

import time
from collections.abc import Callable


class Throughput:
    """Meter of images per second, not counting compilation, evaluation and checkpoints.

    Args:
      batch_size: number of images per batch.
      clock: returns seconds; must be the clock that stamps the reports.
    """

    def __init__(self, batch_size: int, clock: Callable[[], float] = time.monotonic):
        self.batch_size, self.clock = batch_size, clock
        self.images, self.seconds = 0, 0.0
        self._since, self._last = 0.0, 0.0
        self._warm = False

    def start(self) -> None:
        """Starts the clock for a period of training.

        The first period of a process counts from its first report on, because it may start by
        compiling.
        """
        self._since = self._last = self.clock()

    def count(self, batches: int, at: float | None = None) -> None:
        """Counts batches that all modules have finished.

        Args:
          batches: number of batches since the previous report.
          at: time at which they were finished, by default now. A continuous engine also trains
            during an evaluation: batches that were finished before the current period started are
            not counted, because their time is not counted either. The same holds for batches that
            were finished together with the very first one.
        """
        now = self.clock() if at is None else at
        if not self._warm:
            self._warm, self._since, self._last = True, now, now
        elif now > self._since:
            self.images += batches * self.batch_size
            self.seconds += max(0.0, now - self._last)
            self._last = max(now, self._last)

    def skip(self, at: float | None = None) -> None:
        """Leaves out the time since the previous report, until `at` or now, and its images."""
        self._last = max(self._last, self.clock() if at is None else at)

    def rate(self) -> float | None:
        """Returns images per second, or None before the second batch."""
        return round(self.images / self.seconds, 2) if self.seconds and self.images else None
