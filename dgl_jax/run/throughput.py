"""Images per second of training alone."""

import time
from collections.abc import Callable


class Throughput:
    """Images per second of training alone: without compiling, evaluating or saving.

    Args:
      batch_size: images of a batch.
      clock: seconds; the one that reports are stamped with.
    """

    def __init__(self, batch_size: int, clock: Callable[[], float] = time.monotonic):
        self.batch_size, self.clock = batch_size, clock
        self.images, self.seconds = 0, 0.0
        self._since, self._last = 0.0, 0.0
        self._warm = False

    def start(self) -> None:
        """Begins a stretch of training; the first one of a process may begin by compiling and counts from its first report on."""
        self._since = self._last = self.clock()

    def count(self, batches: int, at: float | None = None) -> None:
        """Takes a report that says so many more batches are done by all modules.

        Args:
          batches: since the last report.
          at: when that was, now by default. Of an engine that trains while its reports are read, what was done before the stretch
            began (during an evaluation) is not counted, as the time it took is not.
        """
        now = self.clock() if at is None else at
        if not self._warm:
            self._warm, self._since, self._last = True, now, now
        elif now >= self._since:
            self.images += batches * self.batch_size
            self.seconds += max(0.0, now - self._last)
            self._last = max(now, self._last)

    def rate(self) -> float | None:
        """Returns images per second, None before the second batch."""
        return round(self.images / self.seconds, 2) if self.seconds and self.images else None
