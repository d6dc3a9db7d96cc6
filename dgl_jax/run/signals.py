"""SIGINT and SIGTERM: the run finishes its step and writes a checkpoint."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOG = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint is written."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"{signal.Signals(signum).name}: stopped at step {step}; the same line goes on from there"
        )
        self.signum = signum


class Interruption:
    """The first SIGINT or SIGTERM, once it has come."""

    signum: int | None = None

    def came(self) -> bool:
        """Tells whether to stop."""
        return self.signum is not None

    def __call__(self, signum: int, frame: Any) -> None:
        if self.signum is not None:  # a second one quits at once
            raise KeyboardInterrupt
        self.signum = signum
        _LOG.info(
            "%s: finishing the step and writing a checkpoint; again to quit at once",
            signal.Signals(signum).name,
        )


@contextmanager
def interruptible(reports: Any) -> Iterator[Any]:
    """Closes an engine's reports behind the block, however it ends."""
    try:
        yield reports
    except KeyboardInterrupt as interrupt:
        reports.throw(
            interrupt
        )  # just closed, the engine would wait for its workers, and one may never end
        raise
    finally:
        reports.close()


@contextmanager
def interrupted_by_signals() -> Iterator[Interruption]:
    """Handles both signals inside the block (of the main thread; elsewhere signals are the caller's)."""
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
