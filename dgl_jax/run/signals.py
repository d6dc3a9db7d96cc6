"""Handling of SIGINT and SIGTERM: the run finishes its step and writes a checkpoint."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOG = logging.getLogger(__name__)


class Interrupted(Exception):
    """Raised after a signal has stopped a run and its checkpoint is written."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"{signal.Signals(signum).name}: stopped at step {step}; run the same command again to "
            "resume"
        )
        self.signum = signum


class Interruption:
    """Signal handler that remembers the first SIGINT or SIGTERM.

    Attributes:
      signum: number of that signal; None as long as none has arrived.
    """

    signum: int | None = None

    def came(self) -> bool:
        """Returns True once a signal has arrived."""
        return self.signum is not None

    def __call__(self, signum: int, frame: Any) -> None:
        if self.signum is not None:  # a second signal quits without a checkpoint
            raise KeyboardInterrupt
        self.signum = signum
        _LOG.info(
            "%s: finishing the step and writing a checkpoint; send it again to quit immediately",
            signal.Signals(signum).name,
        )


@contextmanager
def interruptible(reports: Any) -> Iterator[Any]:
    """Closes the report iterator of an engine at the end of a `with` block, on errors too."""
    try:
        yield reports
    except KeyboardInterrupt as interrupt:
        # Pass the interrupt on: a mere `close` would wait for workers, and one may never end.
        reports.throw(interrupt)
        raise
    finally:
        reports.close()


@contextmanager
def interrupted_by_signals() -> Iterator[Interruption]:
    """Handles SIGINT and SIGTERM inside a `with` block.

    Outside the main thread Python allows no signal handlers: nothing is handled there.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {s: signal.signal(s, interruption) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
