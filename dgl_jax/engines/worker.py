"""The workers of the engine `threads`: a module, its state and the thread that gives it its turns; and what all of them share."""

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.engines.asynchronous import RunningModule, Turns
from dgl_jax.engines.base import Publisher
from dgl_jax.spec import Meter


class Update(NamedTuple):
    """What a worker says after an update.

    Attributes:
      module: k.
      metrics: of the update.
      counts: updates of all modules, this one included.
      at: when it was done.
    """

    module: int
    metrics: Metrics
    counts: tuple[int, ...]
    at: float


@dataclass(frozen=True)
class Failure:
    """What a worker says when it ends by an error."""

    module: int
    error: Exception
    trace: str


class Failures(NamedTuple):
    """What is known of a worker's last failure.

    Attributes:
      at: updates the module had then.
      since: updates that it went on from.
      times: failures in a row.
    """

    at: int = -1
    since: int = -1
    times: int = 0


class Pace:
    """How a module gets on: seconds it has waited for packets, and updates a second, over a second at least.

    Over a second, because reports that waited together are read in a burst.
    """

    def __init__(self) -> None:
        self.waited, self.updates = 0.0, 0  # written by the worker alone
        self._since: tuple[float, int] | None = None
        self._rate: float | None = None

    def begin(self, now: float) -> None:
        """Forgets the rate of an earlier run."""
        self._since, self._rate = (now, self.updates), None

    def rate(self, now: float) -> float | None:
        """Returns updates a second, None before a run has begun."""
        if self._since is None or now <= self._since[0]:
            return self._rate
        seconds, made = now - self._since[0], self.updates - self._since[1]
        if self._rate is None or seconds >= 1.0:
            self._rate = made / seconds
        if seconds >= 1.0:
            self._since = (now, self.updates)
        return self._rate


class Crew:
    """What the workers of a run share. A worker knows it while its thread runs only, so that an ended run frees its memory at once.

    Attributes:
      workers: all of them, in the order of their modules.
      turns: of the run.
      clock: seconds.
      began: when the run did.
      events: what the workers say.
      stopping: set once no new turn is to begin.
      counting: held while updates are counted: the counts that an event brings and its place in the queue go together.
    """

    def __init__(self, workers: Sequence["Worker"], turns: Turns, clock: Callable[[], float]):
        self.workers, self.turns, self.clock = workers, turns, clock
        self.events: queue.SimpleQueue[Update | Failure] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.counting = threading.Lock()
        self.began = clock()

    def needed(self, k: int) -> bool:
        """Returns whether module k has updates to make, or a module above it that has."""
        return any(worker.updates < self.turns.until for worker in self.workers[k:])

    def stop(self) -> None:
        """Ends the workers after their current turn; those that wait for a packet at once."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.wake()

    def wake(self) -> None:
        """Lets all that wait for a packet look whether they still need one."""
        for ring in self.turns.rings.rings:
            with ring.changed:
                ring.changed.notify_all()


class Worker(RunningModule):
    """A module, and the thread that gives it its turns.

    Attributes:
      lock: held over a step and over a copy of the state, which is donated to the next step. The state is None where the module
        is down.
      thread: None before the first start, and once nobody waits for it any more.
      progress: when the last turn ended, or the thread began.
      doing: what the thread does, for the watchdog.
      warned: the `progress` that the watchdog has reported.
      failures: its last one.
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
        self.progress, self.doing = 0.0, "not begun"
        self.warned: float | None = None
        self.failures = Failures()
        self._slowdown, self._pace, self._meter = slowdown, pace, meter

    def start(self, crew: Crew) -> None:
        """Starts a thread, the first one or that of a restart."""
        self.progress = crew.clock()
        # A daemon: whoever quits at once does not wait for it.
        self.thread = threading.Thread(
            target=self._work, args=(crew,), name=f"module_{self.number}", daemon=True
        )
        self.thread.start()

    def alive(self) -> bool:
        """Returns whether the thread may still change something."""
        return self.thread is not None and self.thread.is_alive()

    def join(self) -> None:
        """Waits until the thread has ended."""
        if self.thread is not None:
            self.thread.join()

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
        self.doing = "waiting for a batch" if self.number == 0 else "waiting for a packet"
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
            made = turns.run(self, intake)
        if self._slowdown > 1:
            crew.stopping.wait((self._slowdown - 1) * (clock() - started))
        ended = clock()
        if made.metrics is not None:
            self._count(crew, made.metrics, ended)
        if made.above is not None and self._meter is not None:
            message, _ = made.above
            self._meter.count(message.payload, message.context, message.codebook)
        turns.hand_on(crew.workers, self.number, made, started - crew.began, ended - crew.began)
        self.progress = ended

    def _has_input(self, crew: Crew) -> bool:
        """Waits until a packet may be read; returns False if the run stops or nobody needs this module."""
        k = self.number
        if k == 0:
            return True
        ring = crew.turns.rings.ring(k)
        with ring.changed:
            ring.changed.wait_for(
                lambda: crew.stopping.is_set() or not crew.needed(k) or ring.ready()
            )
        return not crew.stopping.is_set() and crew.needed(k)

    def _count(self, crew: Crew, metrics: Metrics, at: float) -> None:
        with crew.counting:
            self.updates += 1
            self._pace.updates += 1
            crew.events.put(
                Update(self.number, metrics, tuple(worker.updates for worker in crew.workers), at)
            )
        if (
            self.updates == crew.turns.until
        ):  # a module below that only feeds may be needed no longer
            crew.wake()
