"""Engine `threads`: asynchronous training with a worker thread and a device group per module.

Each worker takes messages from the ring at its module's entrance at its own speed, updates, and
writes its messages to the ring of the next module. It never waits for a slower neighbor, because a
full ring is overwritten, and never makes a faster one wait, because a message may be read again. It
waits only for the first message, or while `replay.max_reuse` blocks all messages. Runs are not
repeatable, because the operating system's scheduler decides which worker runs when.
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax import waits
from dgl_jax.config import ReplaySettings
from dgl_jax.config.fields import number, option
from dgl_jax.config.registry import ENGINES
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.asynchronous import (
    Asynchronous,
    AsynchronousOptions,
    Turns,
    check_rings,
    flight_of,
)
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    PlacedOptions,
    Publisher,
    Report,
    counts,
)
from dgl_jax.engines.flight import FrozenRings
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.transfer import put
from dgl_jax.engines.worker import Crew, Failure, Failures, Pace, Worker
from dgl_jax.errors import ModuleFailed, UserError, explain
from dgl_jax.methods.post import opened
from dgl_jax.schedule import never
from dgl_jax.spec import Meter, Traffic, TrainSpec

_LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # longest sleep of the controlling thread between checks of signals and workers
_RESTARTS = 3  # restarts allowed in a row, without a new update in between


@dataclass(frozen=True)
class ThreadsOptions(AsynchronousOptions, PlacedOptions):
    """Options of the engine `threads`.

    Attributes:
      restart_workers: restart a failed module from its newest checkpoint instead of ending the run.
      watchdog_seconds: seconds without progress after which a warning names the module; 0: never.
    """

    restart_workers: bool = option(False, free=True)
    watchdog_seconds: float = number(600.0, 0.0, 1e9, free=True)

    def check(self, settings: Any) -> None:
        """Raises UserError if slowdowns or group sizes do not fit the number of modules."""
        AsynchronousOptions.check(self, settings)
        PlacedOptions.check(self, settings)


class ThreadsEngine(Asynchronous):
    """Asynchronous engine with one worker thread per module.

    Attributes:
      recover: returns a module's state from the newest checkpoint, or None if there is no
        checkpoint. If set, a failed module is restarted while the others keep training.
      clock: returns monotonic seconds; replaceable by tests.
      copy: copies a module's state on its devices; replaceable by tests.
      meters: bytes sent across each hop.
      paces: waiting time and update rate of each module.
    """

    continuous = True
    unit = "seconds"

    def __init__(
        self, spec: TrainSpec, placement: Placement, engine: ThreadsOptions, replay: ReplaySettings
    ):
        super().__init__(spec, placement, engine, replay)
        modules = range(len(spec.modules))
        self.slowdown = engine.slowdown or (1.0,) * len(modules)
        self.watchdog_seconds = engine.watchdog_seconds
        self.recover: Callable[[int], ModuleState | None] | None = None
        self.clock: Callable[[], float] = time.monotonic
        self.copy = _copy
        self.state_programs = [self.copy]
        self.meters = [Meter() for _ in modules[1:]]
        self.paces = [Pace() for _ in modules]

    def traffic(self) -> Traffic:
        """Returns bytes per image, measured once a message was sent and computed before."""
        return self.spec.traffic(self.meters)

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Returns the ring statistics plus recent updates/s and total wait time per module."""
        gauges, now = super().gauges(state), self.clock()
        for k, pace in enumerate(self.paces):
            if (rate := pace.rate(now)) is not None:
                gauges[f"work/module_{k}/updates_per_second"] = rate
            gauges[f"work/module_{k}/wait_seconds"] = pace.waited
        return gauges

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`.

        Workers keep training while the caller handles reports. Closing the iterator stops them
        after their current step. Every report can return a snapshot: a copy of the modules at the
        time of the call, which may be ahead of the report, or behind it if a module was restarted.

        Raises:
          UserError: a module failed and restarting is off, or it failed repeatedly.
        """
        self.prepare()
        supervisor = Supervisor(self, state, source, until)
        supervisor.start()
        try:
            while not supervisor.ended():
                if stop():
                    supervisor.stop()
                event = supervisor.next_event()
                if isinstance(event, Failure):
                    supervisor.restart(event)
                elif event is not None:
                    yield event
                supervisor.watch()
        except KeyboardInterrupt:
            # Quit at once without joining the workers, which are daemon threads.
            supervisor.stop()
            supervisor.abandon()
            raise
        finally:
            supervisor.stop()
            supervisor.join()


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class Supervisor:
    """Controls the workers during one call of `ThreadsEngine.run`; used by one thread.

    It starts the workers, receives their events, restarts failed modules, warns about stalled ones
    and takes snapshots.

    Attributes:
      workers: one worker per module.
      crew: state shared by the workers.
      pending_reports: reports received while this thread waited for the event of a failure.
    """

    def __init__(self, engine: ThreadsEngine, state: EngineState, source: Source, until: int):
        self.engine, self.rings = engine, flight_of(state)
        # Checkpoints save the rings before the modules, which may have published in between. So the
        # first message of every restored module carries its codebook.
        publishers = [*(Publisher(hop.period) for hop in engine.hops), None]
        worker_args = zip(
            state.modules,
            counts(state),
            publishers,
            engine.slowdown,
            engine.paces,
            [*engine.meters, None],
            strict=True,
        )
        self.workers = [Worker(k, *args) for k, args in enumerate(worker_args)]
        self.crew = Crew(self.workers, Turns(engine, self.rings, source, until), engine.clock)
        for pace in engine.paces:
            pace.begin(self.crew.began)
        self.pending_reports: deque[Report] = deque()

    def start(self) -> None:
        """Starts the threads of all workers."""
        for worker in self.workers:
            worker.start(self.crew)

    def stop(self) -> None:
        """Tells the workers to end after their current turn."""
        self.crew.stop()

    def abandon(self) -> None:
        """Treats all workers as ended, so that nothing waits for their threads."""
        for worker in self.workers:
            worker.thread = None

    def join(self) -> None:
        """Waits until all workers have ended."""
        for worker in self.workers:
            worker.join()

    def ended(self) -> bool:
        """Returns True if all workers have ended and all their events were received."""
        return not self._working() and self.crew.events.empty() and not self.pending_reports

    def next_event(self) -> Report | Failure | None:
        """Returns the next report or failure, or None if none arrives within a short time."""
        return self.pending_reports.popleft() if self.pending_reports else self._listen()

    def snapshot(self, flight: bool = True) -> EngineState:
        """Copies the rings (unless `flight` is false), then each module between two of its updates.

        Each worker is blocked only while its copy is dispatched. A module that has failed is
        restarted first. After all workers have ended, the rings are returned without a copy.
        """
        ended = not self._working()
        frozen = FrozenRings(self.rings) if flight and not ended else None
        modules = []
        for worker in self.workers:
            state, batches = self._copy(worker)
            modules.append(state)
            if frozen and worker.number == 0:
                frozen.set_batches(batches)
        return EngineState(tuple(modules), self.rings if flight and ended else frozen)

    def restart(self, failure: Failure) -> None:
        """Restarts a failed module from its newest checkpoint.

        Args:
          failure: event of the failed worker.

        Raises:
          UserError: the error is a UserError itself, there is no checkpoint, the module failed too
            often in a row, or the run is stopping.
        """
        worker, error = self.workers[failure.module], failure.error
        if isinstance(error, UserError):
            raise error
        k, updates, previous = worker.number, worker.updates, worker.failures
        _LOG.error("module_%d failed after %d updates:\n%s", k, updates, failure.trace.rstrip())
        # Failures are in a row if the module made no update since the restart, or if it failed at
        # the same update as before.
        in_a_row = (
            previous.in_a_row + 1 if updates in (previous.failed_at, previous.resumed_at) else 1
        )
        may_restart = in_a_row <= _RESTARTS and not self.crew.stopping.is_set()
        state = self.engine.recover(k) if self.engine.recover and may_restart else None
        if state is None:
            repeated = f" {in_a_row} times in a row" if in_a_row > 1 else ""
            why = explain(error) or f"{type(error).__name__}: {error}"
            raise ModuleFailed(
                f"module_{k} failed{repeated} after {updates} updates: {why}; the other modules "
                "have stopped (the log has the traceback)"
            ) from error
        worker.state, worker.mail = opened(put(state, self.engine.placement.replicated(k)))
        worker.failures = Failures(updates, int(jax.device_get(state.updates)), in_a_row)
        with self.crew.counting:
            worker.updates = worker.failures.resumed_at
        if worker.publisher is not None:
            # The ring may hold a codebook that the restored state has not published yet.
            worker.publisher.forget()
        _LOG.warning(
            "module_%d resumes from its newest checkpoint with %d updates; the others kept running",
            k,
            worker.updates,
        )
        worker.start(self.crew)

    def watch(self) -> None:
        """Logs a warning, once per stall, for each worker without progress for too long."""
        limit, now = self.engine.watchdog_seconds, self.engine.clock()
        for worker in self.workers:
            since = worker.progress
            if limit and worker.alive() and now - since > limit and worker.warned != since:
                worker.warned = since
                _LOG.warning(
                    "module_%d has made no progress for %.0f s: %s",
                    worker.number,
                    now - since,
                    worker.doing,
                )

    def _working(self) -> bool:
        return any(worker.alive() for worker in self.workers)

    def _listen(self) -> Report | Failure | None:
        try:
            event = self.crew.events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None
        if isinstance(event, Failure):
            return event
        metrics_by_module: list[Metrics] = [{} for _ in self.workers]
        metrics_by_module[event.module] = event.metrics
        return Report(
            event.counts, tuple(metrics_by_module), self.snapshot, event.at, step=min(event.counts)
        )

    def _copy(self, worker: Worker) -> tuple[ModuleState, int]:
        """Returns a copy of a module and the number of batches read at that time."""
        while True:
            with waits.holding(worker.lock):
                if (state := worker.state) is not None:
                    return worker.whole(self.engine.copy(state)), self.rings.batches
            # Without the lock the state is None only after a failure: wait for its event, restart.
            while worker.state is None:
                event = self._listen()
                if isinstance(event, Failure):
                    self.restart(event)
                elif event is not None:
                    self.pending_reports.append(event)


def _make(run: EngineInputs, options: ThreadsOptions) -> ThreadsEngine:
    check_rings(run)
    return ThreadsEngine(run.spec, run.placed(options.group_sizes), options, run.replay)


ENGINES.ship(threads=EngineKind(_make, ThreadsOptions, asynchronous=True, continuous=True))
