"""Asynchronous training for real: every module has a worker and devices of its own, and a ring of packets at its entrance.

A worker takes a packet from its ring at its own speed, updates, and writes what it made to the ring of the next module. It never
waits for a slower neighbour (a full ring is written over) and never makes a faster one wait (a packet may be read again). It waits
only for a first packet, or where `replay.max_reuse` holds all packets back. Nothing here is repeatable: the system's scheduler
decides who works when.
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

from dgl_jax.config import ReplaySettings
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
from dgl_jax.engines.flight import Still
from dgl_jax.engines.placement import Placement, put
from dgl_jax.engines.worker import Crew, Failure, Failures, Pace, Worker
from dgl_jax.errors import UserError, explain
from dgl_jax.fields import number, option
from dgl_jax.methods.base import opened
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import never
from dgl_jax.spec import Meter, Traffic, TrainSpec

_LOG = logging.getLogger(__name__)

_POLL_SECONDS = (
    0.2  # how long the controlling thread sleeps at most before it looks after signals and workers
)
_RESTARTS = 3  # of a module that fails again and again without an update more


@dataclass(frozen=True)
class ThreadsOptions(AsynchronousOptions, PlacedOptions):
    """Of a worker thread a module."""

    restart_workers: bool = option(
        False, free=True
    )  # a module that fails goes on from its newest checkpoint
    watchdog_seconds: float = number(
        600.0, 0.0, 1e9, free=True
    )  # without progress, then it is reported; 0: never

    def check(self, settings: Any) -> None:
        """Raises UserError if slowdowns or group sizes do not fit."""
        AsynchronousOptions.check(self, settings)
        PlacedOptions.check(self, settings)


class ThreadsEngine(Asynchronous):
    """A worker thread a module.

    Attributes:
      recover: gives a module's state from the newest checkpoint, and None where there is none; with it a failed module is restarted
        while the others go on.
      clock: seconds; a test brings its own.
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
        self.of_states = [self.copy]
        self.meters = [
            Meter() for _ in modules[1:]
        ]  # of what has left for the ring of module k + 1
        self.paces = [Pace() for _ in modules]

    def traffic(self) -> Traffic:
        """What went through the rings; before the first packet, what the encoded arrays weigh."""
        return self.spec.traffic(self.meters)

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Those of the rings, and of each module: updates a second lately, seconds waited for packets."""
        found, now = super().gauges(state), self.clock()
        for k, pace in enumerate(self.paces):
            if (rate := pace.rate(now)) is not None:
                found[f"work/module_{k}/updates_per_second"] = rate
            found[f"work/module_{k}/wait_seconds"] = pace.waited
        return found

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`.

        Reports come while the workers go on; closing the iterator stops them after their current step. Every report gives a
        snapshot: a copy of what the modules are then, which may be further than the report, or behind it if one was restarted.

        Raises:
          UserError: a module failed, and was not to be restarted or failed again and again.
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
        except (
            KeyboardInterrupt
        ):  # to quit at once: the workers are daemons and nobody waits for them
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
    """One call of `ThreadsEngine.run`: starts the workers, hears them, restarts, watches and copies them. Used by one thread."""

    def __init__(self, engine: ThreadsEngine, state: EngineState, source: Source, until: int):
        self.engine, self.rings = engine, flight_of(state)
        # Rings are saved before the modules, which may have published since: a codebook goes along with each first packet.
        publishers = [*(Publisher(hop) for hop in engine.hops), None]
        modules = zip(
            state.modules,
            counts(state),
            publishers,
            engine.slowdown,
            engine.paces,
            [*engine.meters, None],
            strict=True,
        )
        self.workers = [Worker(k, *parts) for k, parts in enumerate(modules)]
        self.crew = Crew(self.workers, Turns(engine, self.rings, source, until), engine.clock)
        for pace in engine.paces:
            pace.begin(self.crew.began)
        self.heard: deque[Report] = (
            deque()
        )  # reports that came while this thread waited for a failure to be told

    def start(self) -> None:
        """Starts all workers."""
        for worker in self.workers:
            worker.start(self.crew)

    def stop(self) -> None:
        """Ends the workers after their current turn."""
        self.crew.stop()

    def abandon(self) -> None:
        """Waits for no worker any more, and takes all of them for ended."""
        for worker in self.workers:
            worker.thread = None

    def join(self) -> None:
        """Waits until all workers have ended."""
        for worker in self.workers:
            worker.join()

    def ended(self) -> bool:
        """Returns whether all workers have ended, and everything they said has been heard."""
        return not self._working() and self.crew.events.empty() and not self.heard

    def next_event(self) -> Report | Failure | None:
        """Waits a little for what a worker says."""
        return self.heard.popleft() if self.heard else self._listen()

    def snapshot(self, flight: bool = True) -> EngineState:
        """Copies the rings (unless `flight` is false), then one module after the other between two of its updates.

        A worker waits no longer than its own copy takes to be asked for. A module that is down is restarted first. Once all workers
        have ended, the rings come as they are.
        """
        ended = not self._working()
        still = Still(self.rings) if flight and not ended else None
        modules = []
        for worker in self.workers:
            state, batches = self._copy(worker)
            modules.append(state)
            if still and worker.number == 0:
                still.begin_at(batches)
        return EngineState(tuple(modules), self.rings if flight and ended else still)

    def restart(self, failure: Failure) -> None:
        """Starts a failed module again from its newest checkpoint.

        Raises:
          UserError: there is none, the module failed again and again, the run stops, or the user is to blame.
        """
        worker, error = self.workers[failure.module], failure.error
        if isinstance(error, UserError):
            raise error
        k, updates, last = worker.number, worker.updates, worker.failures
        _LOG.error("module_%d failed after %d updates:\n%s", k, updates, failure.trace.rstrip())
        # In a row: no update since the restart, or the same one failed again.
        times = last.times + 1 if updates in (last.at, last.since) else 1
        again = times <= _RESTARTS and not self.crew.stopping.is_set()
        state = self.engine.recover(k) if self.engine.recover and again else None
        if state is None:
            in_a_row = f" {times} times in a row" if times > 1 else ""
            why = explain(error) or f"{type(error).__name__}: {error}"
            raise UserError(
                f"module_{k} failed{in_a_row} after {updates} updates: {why}; the others have "
                "stopped, the last checkpoint is good (the log has the traceback)"
            ) from error
        worker.state, worker.mail = opened(put(state, self.engine.placement.replicated(k)))
        worker.failures = Failures(updates, int(jax.device_get(state.updates)), times)
        with self.crew.counting:
            worker.updates = worker.failures.since
        if worker.publisher is not None:
            worker.publisher.forget()  # the ring may hold a codebook that this state has not published yet
        _LOG.warning(
            "module_%d goes on from its newest checkpoint, with %d updates; the others never stopped",
            k,
            worker.updates,
        )
        worker.start(self.crew)

    def watch(self) -> None:
        """Reports a worker that has made no progress for too long, once."""
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
        brought: list[Metrics] = [{} for _ in self.workers]
        brought[event.module] = event.metrics
        return Report(event.counts, tuple(brought), self.snapshot, event.at, step=min(event.counts))

    def _copy(self, worker: Worker) -> tuple[ModuleState, int]:
        """Returns a copy of a module, and the batches read when it was made."""
        while True:
            with worker.lock:
                if (state := worker.state) is not None:
                    return worker.whole(self.engine.copy(state)), self.rings.batches
            while worker.state is None:  # its failure is on its way
                event = self._listen()
                if isinstance(event, Failure):
                    self.restart(event)
                elif event is not None:
                    self.heard.append(event)


def _make(run: EngineInputs, options: ThreadsOptions) -> ThreadsEngine:
    check_rings(run)
    return ThreadsEngine(run.spec, run.placed(options.group_sizes), options, run.replay)


ENGINES.ship(threads=EngineKind(_make, ThreadsOptions, asynchronous=True, continuous=True))
