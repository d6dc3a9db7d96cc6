"""Waits of the main thread that a signal always ends.

Python calls a signal handler between two instructions of the main thread. A signal that arrives
just before an untimed wait begins is handled only after the wait, which may never end. Therefore
these functions wait for short times and check again.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS = 0.2  # longest wait before signals are handled


def join(thread: threading.Thread) -> None:
    """Waits until a thread has ended."""
    while thread.is_alive():
        thread.join(_SECONDS)


def wait_for(changed: threading.Condition, reached: Callable[[], bool]) -> None:
    """Waits on a condition, which the caller holds, until `reached` returns True."""
    while not changed.wait_for(reached, _SECONDS):
        pass


@contextmanager
def holding(lock: threading.Lock) -> Iterator[None]:
    """Holds a lock during a `with` block."""
    while not lock.acquire(timeout=_SECONDS):
        pass
    try:
        yield
    finally:
        lock.release()
