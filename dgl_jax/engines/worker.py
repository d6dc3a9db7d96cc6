"""Workers of the engine `threads`: a module with its thread, and the state that workers share."""

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from dgl_jax import waits
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.engines.asynchronous import RunningModule, Turns
from dgl_jax.engines.base import Publisher
from dgl_jax.spec import Meter


class Update(NamedTuple):
    """Event that a worker sends after an update.

    Attributes:
      module: index k of the module.
      metrics: metrics of the update.
      counts: number of updates of each module, including this one.
      at: time at which the update finished.
    """

    module: int
    metrics: Metrics
    counts: tuple[int, ...]
    at: float


@dataclass(frozen=True)
class Failure:
    """Event that a worker sends when an error ends it.

    Attributes:
      module: index k of the module.
      error: the exception.
      trace: formatted traceback.
    """

    module: int
    error: Exception
    trace: str


class Failures(NamedTuple):
    """Record of a worker's most recent failure.

    Attributes:
      failed_at: number of updates of the module when it failed; -1: it never failed.
      resumed_at: number of updates of the state that it was restarted from.
      in_a_row: number of failures in a row.
    """

    failed_at: int = -1
    resumed_at: int = -1
    in_a_row: int = 0


class Pace:
    """Seconds that a module has waited for messages, and its recent updates per second.

    The rate covers at least one second, because reports that queued up are handled in a burst.
    """

    def __init__(self) -> None:
        self.waited, self.updates = 0.0, 0  # only the worker writes these
        self._since: tuple[float, int] | None = None
        self._rate: float | None = None

    def begin(self, now: float) -> None:
        """Forgets the rate of an earlier run."""
        self._since, self._rate = (now, self.updates), None

    def rate(self, now: float) -> float | None:
        """Returns recent updates per second, or None before a run has begun."""
        if self._since is None or now <= self._since[0]:
            return self._rate
        seconds, new_updates = now - self._since[0], self.updates - self._since[1]
        if self._rate is None or seconds >= 1.0:
            self._rate = new_updates / seconds
        if seconds >= 1.0:
            self._since = (now, self.updates)
        return self._rate


class Crew:
    """State shared by the workers of a run.

    A worker refers to it only while its thread runs, so that a finished run frees its memory at
    once.

    Attributes:
      workers: all workers, in the order of their modules.
      turns: turns of the run.
      clock: returns monotonic seconds.
      began: time at which the run began.
      events: queue of the workers' events.
      stopping: set when no new turn may begin.
      counting: lock held while an update is counted, so that events enter the queue in the order of
        their counts.
    """

    def __init__(self, workers: Sequence["Worker"], turns: Turns, clock: Callable[[], float]):
        self.workers, self.turns, self.clock = workers, turns, clock
        self.events: queue.SimpleQueue[Update | Failure] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.counting = threading.Lock()
        self.began = clock()

    def needed(self, k: int) -> bool:
        """Returns True if module k or a module above it still has updates to make."""
        return any(worker.updates < self.turns.until for worker in self.workers[k:])

    def stop(self) -> None:
        """Stops the workers after their current turn, or at once if they wait for a message."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.wake()

    def wake(self) -> None:
        """Wakes all workers that wait for a message, so that they check if they still need one."""
        for ring in self.turns.rings.rings:
            with ring.changed:
                ring.changed.notify_all()


class Worker(RunningModule):
    """Module together with the thread that runs its turns.

    Attributes:
      lock: held during a step and while the state is copied, because the next step donates the
        state. `state` is None after a failure.
      thread: None before the first start, and after the run was abandoned.
      progress: time at which the last turn ended or the thread started.
      doing: current activity of the thread, for the watchdog.
      warned: value of `progress` for which the watchdog has already warned.
      failures: record of the most recent failure.
    """

    def __init__(
        self,
        number: int,
        state: ModuleState,
        updates: int,
        publisher: Publisher | None,
        slowdown: float,
        pace: Pace,
        meter: Meter | None,
    ):
        super().__init__(number, state, updates, publisher)
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.progress, self.doing = 0.0, "not started"
        self.warned: float | None = None
        self.failures = Failures()
        self._slowdown, self._pace, self._meter = slowdown, pace, meter

    def start(self, crew: Crew) -> None:
        """Starts a thread for the module, at the beginning or after a failure."""
        self.progress = crew.clock()
        # A daemon thread, so that a process which exits does not wait for it.
        self.thread = threading.Thread(
            target=self._work, args=(crew,), name=f"module_{self.number}", daemon=True
        )
        self.thread.start()

    def alive(self) -> bool:
        """Returns True if the thread may still change the module."""
        return self.thread is not None and self.thread.is_alive()

    def join(self) -> None:
        """Waits until the thread has ended."""
        if self.thread is not None:
            waits.join(self.thread)

    def _work(self, crew: Crew) -> None:
        try:
            with jax.transfer_guard("disallow"):
                while not crew.stopping.is_set() and crew.needed(self.number):
                    self._turn(crew)
        except Exception as error:
            crew.events.put(Failure(self.number, error, traceback.format_exc()))
        else:
            self.doing = "done"

    def _turn(self, crew: Crew) -> None:
        turns, clock = crew.turns, crew.clock
        self.doing = "waiting for a batch" if self.number == 0 else "waiting for a message"
        begin = clock()
        intake = turns.take(self.number) if self._has_input(crew) else None
        if intake is None:
            return
        self.doing = (
            "feeding the next module"
            if turns.finished(self)
            else f"working on update {self.updates + 1}"
        )
        started = clock()
        self._pace.waited += started - begin
        with self.lock:
            outcome = turns.run(self, intake)
        if self._slowdown > 1:
            crew.stopping.wait((self._slowdown - 1) * (clock() - started))
        ended = clock()
        if outcome.metrics is not None:
            self._count(crew, outcome.metrics, ended)
        if outcome.above is not None and self._meter is not None:
            message, _ = outcome.above
            self._meter.count(message.payload, message.context, message.codebook)
        turns.deliver(crew.workers, self.number, outcome, started - crew.began, ended - crew.began)
        self.progress = ended

    def _has_input(self, crew: Crew) -> bool:
        """Waits for a readable message; returns False if no message is needed any more."""
        k = self.number
        if k == 0:
            return True
        ring = crew.turns.rings.ring(k)
        with ring.changed:
            ring.changed.wait_for(
                lambda: crew.stopping.is_set() or not crew.needed(k) or ring.ready()
            )
        return not crew.stopping.is_set() and crew.needed(k)

    def _count(self, crew: Crew, metrics: Metrics, finished_at: float) -> None:
        with crew.counting:
            self.updates += 1
            self._pace.updates += 1
            crew.events.put(
                Update(
                    self.number,
                    metrics,
                    tuple(worker.updates for worker in crew.workers),
                    finished_at,
                )
            )
        if self.updates == crew.turns.until:
            # Finished modules below may no longer be needed as feeders.
            crew.wake()
