"""Tests that waits of the main thread call signal handlers, whichever thread got the signal."""

import signal
import sys
import threading

import pytest

from dgl_jax import waits


@pytest.fixture
def signaled(monkeypatch):
    """Returns an event that is set when the main thread handles SIGUSR1."""
    handled, before = threading.Event(), sys.getswitchinterval()
    previous = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    sys.setswitchinterval(60)  # a thread that has set an event begins its wait before others run
    yield handled
    sys.setswitchinterval(before)
    signal.signal(signal.SIGUSR1, previous)


class Sender:
    """Thread that sends itself a signal once `entered` is set; the main thread does not wake up.

    Attributes:
      entered: set by the main thread right before its wait.
      noticed: whether the main thread handled the signal while this thread was waiting for it.
    """

    def __init__(self, handled: threading.Event, seconds: float, finish=lambda: None):
        self.entered, self.noticed = threading.Event(), False

        def send() -> None:
            assert self.entered.wait(60)
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            self.noticed = handled.wait(seconds)
            finish()

        self.thread = threading.Thread(target=send)
        self.thread.start()


class Announced:
    """Lock that sets an event before each `acquire`."""

    def __init__(self, lock: threading.Lock, entered: threading.Event):
        self._lock, self._entered = lock, entered
        self.release = lock.release

    def acquire(self, timeout: float) -> bool:
        self._entered.set()
        return self._lock.acquire(timeout=timeout)


def held_lock(handled: threading.Event, seconds: float) -> Sender:
    """Waits for a lock that is released once a signal is handled, or after some seconds."""
    lock = threading.Lock()
    assert lock.acquire()
    sender = Sender(handled, seconds, finish=lock.release)
    with waits.holding(Announced(lock, sender.entered)):
        assert lock.locked()
    assert not lock.locked()
    sender.thread.join()
    return sender


def test_wait_for_a_lock_handles_signals(signaled):
    assert held_lock(signaled, seconds=60).noticed


def test_an_untimed_wait_would_miss_them(signaled, monkeypatch):
    monkeypatch.setattr(waits, "_SECONDS", -1)  # `Lock.acquire` then waits without limit
    assert not held_lock(signaled, seconds=1).noticed


def test_wait_for_a_thread_handles_signals(signaled):
    sender = Sender(signaled, seconds=60)
    sender.entered.set()
    waits.join(sender.thread)
    assert not sender.thread.is_alive()
    assert sender.noticed


def test_wait_for_a_condition_handles_signals(signaled):
    changed, done = threading.Condition(), []

    def finish() -> None:
        with changed:
            done.append(True)
            changed.notify_all()

    sender = Sender(signaled, seconds=60, finish=finish)
    with changed:
        sender.entered.set()
        waits.wait_for(changed, lambda: bool(done))
    sender.thread.join()
    assert done == [True]
    assert sender.noticed
