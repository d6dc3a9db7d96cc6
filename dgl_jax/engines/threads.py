"""Asynchronous training for real: every module has a worker and devices of its own, and a ring of packets at its entrance.

A worker takes a packet from its ring at its own speed, updates, and writes what it made to the ring of the next module. It never
waits for a slower neighbour (a full ring is written over) and never makes a faster one wait (a packet may be read again). It waits
only for a first packet, or where `replay.max_reuse` holds all packets back. Nothing here is repeatable: the system's scheduler
decides who works when.
"""

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax.config import EngineSettings, ReplaySettings
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.asynchronous import Asynchronous, Rings, Still, flight_of
from dgl_jax.engines.base import EngineState, Report, counts
from dgl_jax.engines.placement import Placement, put
from dgl_jax.errors import UserError, explain
from dgl_jax.schedule import never
from dgl_jax.spec import Meter, Traffic, TrainSpec
from dgl_jax.types import Header

_LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # how long the controlling thread sleeps at most before it looks after signals and workers
_RESTARTS = 3  # of a module that fails again and again without an update more


@dataclass(frozen=True)
class _Failure:
    module: int
    error: Exception
    trace: str


class ThreadsEngine(Asynchronous):
    """A worker thread a module.

    Attributes:
      recover: gives a module's state from the newest checkpoint, and None where there is none; with it a failed module is restarted
        while the others go on.
      clock: seconds; a test brings its own.
    """

    continuous = True
    unit = "seconds"

    def __init__(self, spec: TrainSpec, placement: Placement, engine: EngineSettings, replay: ReplaySettings):
        super().__init__(spec, placement, engine, replay)
        modules = range(len(spec.modules))
        self.slowdown = engine.slowdown or (1.0,) * len(modules)
        self.watchdog_seconds = engine.watchdog_seconds
        self.recover: Callable[[int], ModuleState | None] | None = None
        self.clock: Callable[[], float] = time.monotonic
        self.copy = _copy
        self.of_states = [self.copy]
        self.meters = [Meter() for _ in modules[1:]]  # of what has left for the ring of module k + 1
        self.waited = [0.0 for _ in modules]  # seconds a module had no packet to read
        self._paces = [_Pace() for _ in modules]

    def traffic(self) -> Traffic:
        """What went through the rings; before the first packet, what the encoded arrays weigh."""
        return self.spec.traffic(self.meters)

    def gauges(self, state: EngineState) -> dict[str, float]:
        """Those of the rings, and of each module: updates a second lately, seconds waited for packets."""
        found, now = super().gauges(state), self.clock()
        for k, pace in enumerate(self._paces):
            if (rate := pace.rate(now)) is not None:
                found[f"work/module_{k}/updates_per_second"] = rate
            found[f"work/module_{k}/wait_seconds"] = self.waited[k]
        return found

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`.

        Reports come while the workers go on; closing the iterator stops them after their current step. Every report gives a
        snapshot: a copy of what the modules are then, which may be further than the report, or behind it if one was restarted.

        Raises:
          UserError: a module failed, and was not to be restarted or failed again and again.
        """
        self.prepare()
        run = _Run(self, state, source, until)
        run.start()
        try:
            while not run.ended():
                if stop():
                    run.stop()
                event = run.next_event()
                if isinstance(event, _Failure):
                    run.restart(event)
                elif event is not None:
                    yield event
                run.watch()
        except KeyboardInterrupt:  # to quit at once: the workers are daemons and nobody waits for them
            run.stop()
            run.workers = []
            raise
        finally:
            run.stop()
            run.join()


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class _Pace:
    """Updates a second, over a second at least: reports that waited together are read in a burst."""

    def __init__(self) -> None:
        self.updates = 0  # written by the worker alone
        self._since: tuple[float, int] | None = None
        self._rate: float | None = None

    def begin(self, now: float) -> None:
        self._since, self._rate = (now, self.updates), None

    def rate(self, now: float) -> float | None:
        """None before a run has begun."""
        if self._since is None or now <= self._since[0]:
            return self._rate
        seconds, made = now - self._since[0], self.updates - self._since[1]
        if self._rate is None or seconds >= 1.0:
            self._rate = made / seconds
        if seconds >= 1.0:
            self._since = (now, self.updates)
        return self._rate


class _Run:
    """One call of `ThreadsEngine.run`: what its workers share."""

    def __init__(self, engine: ThreadsEngine, state: EngineState, source: Source, until: int):
        self.engine, self.until = engine, until
        self.flight: Rings = flight_of(state)
        self.states: list[ModuleState | None] = list(state.modules)
        self.updates = counts(state)
        self.batches = source.batches(self.flight.batches)
        self.events: queue.SimpleQueue[Report | _Failure] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.counting = threading.Lock()  # a report's counts and its place in the queue go together
        self.taken = self.flight.batches  # batches read, those of turns that failed among them
        # Reports that came while the controlling thread waited for a failure to be told.
        self.heard: deque[Report] = deque()
        # A state is donated to the next step, so whoever copies it holds its lock. None: the module is down.
        self.locks = [threading.Lock() for _ in self.states]
        # Modules whose newest codebook may not be the one in the next ring, whatever the schedule says.
        self.unpublished = {k for k, hop in enumerate(engine.hops) if hop.period}
        self.began = engine.clock()
        for pace in engine._paces:
            pace.begin(self.began)
        self.progress = [self.began for _ in self.states]
        self.doing = ["not begun" for _ in self.states]
        self.warned: list[float | None] = [None for _ in self.states]
        # Of the last failure: updates then, updates that the module went on from, failures in a row.
        self.failures = [(-1, -1, 0) for _ in self.states]
        self.workers: list[threading.Thread | None] = [None for _ in self.states]

    # The controlling thread

    def start(self) -> None:
        for k in range(len(self.states)):
            self._launch(k)

    def stop(self) -> None:
        """Workers end after their current step; those that wait for a packet at once."""
        if not self.stopping.is_set():
            self.stopping.set()
            self._wake()

    def join(self) -> None:
        for worker in self.workers:
            if worker is not None:
                worker.join()

    def ended(self) -> bool:
        """All workers have, and everything they said has been heard."""
        return not self.working() and self.events.empty() and not self.heard

    def working(self) -> bool:
        """Tells whether any worker may still change something."""
        return any(worker is not None and worker.is_alive() for worker in self.workers)

    def next_event(self) -> Report | _Failure | None:
        """Waits a little for what a worker says."""
        return self.heard.popleft() if self.heard else self._listen()

    def _listen(self) -> Report | _Failure | None:
        try:
            return self.events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None

    def snapshot(self, flight: bool = True) -> EngineState:
        """Copies the rings (unless `flight` is false), then one module after the other between two of its updates.

        A worker waits no longer than its own copy takes to be asked for. A module that is down is restarted first. Once all workers
        have ended, the rings come as they are.
        """
        ended = not self.working()
        still = Still(self.flight) if flight and not ended else None
        modules = []
        for k in range(len(self.states)):
            state, batches = self._copy(k)
            modules.append(state)
            if still and k == 0:
                still.begin_at(batches)
        return EngineState(tuple(modules), self.flight if flight and ended else still)

    def _copy(self, k: int) -> tuple[ModuleState, int]:
        """A copy of a module, and the batches read when it was made."""
        while True:
            with self.locks[k]:
                if (state := self.states[k]) is not None:
                    return self.engine.copy(state), self.flight.batches
            while self.states[k] is None:  # its failure is on its way
                event = self._listen()
                if isinstance(event, _Failure):
                    self.restart(event)
                elif event is not None:
                    self.heard.append(event)

    def restart(self, failure: _Failure) -> None:
        """The failed module from its newest checkpoint, or the end of the run."""
        k, error = failure.module, failure.error
        if isinstance(error, UserError):
            raise error
        _LOG.error("module_%d failed after %d updates:\n%s", k, self.updates[k], failure.trace.rstrip())
        before, since, times = self.failures[k]
        # In a row: no update since the restart, or the same one failed again.
        times = times + 1 if self.updates[k] in (before, since) else 1
        state = self.engine.recover(k) if self.engine.recover and times <= _RESTARTS and not self.stopping.is_set() else None
        if state is None:
            again = f" {times} times in a row" if times > 1 else ""
            why = explain(error) or f"{type(error).__name__}: {error}"
            raise UserError(
                f"module_{k} failed{again} after {self.updates[k]} updates: {why}; the others have "
                "stopped, the last checkpoint is good (the log has the traceback)"
            ) from error
        self.states[k] = put(state, self.engine.placement.replicated(k))
        self.failures[k] = (self.updates[k], int(jax.device_get(state.updates)), times)
        with self.counting:
            self.updates[k] = self.failures[k][1]
        if k + 1 < len(self.states) and self.engine.hops[k].period:
            self.unpublished.add(k)
        _LOG.warning("module_%d goes on from its newest checkpoint, with %d updates; the others never stopped", k, self.updates[k])
        self._launch(k)

    def watch(self) -> None:
        """Reports a worker that has made no progress for too long, once."""
        limit, now = self.engine.watchdog_seconds, self.engine.clock()
        for k, worker in enumerate(self.workers):
            since = self.progress[k]
            if limit and worker is not None and worker.is_alive() and now - since > limit and self.warned[k] != since:
                self.warned[k] = since
                _LOG.warning("module_%d has made no progress for %.0f s: %s", k, now - since, self.doing[k])

    # The workers

    def _launch(self, k: int) -> None:
        self.progress[k] = self.engine.clock()
        self.workers[k] = threading.Thread(target=self._work, args=(k,), name=f"module_{k}", daemon=True)
        self.workers[k].start()  # type: ignore[union-attr]

    def _work(self, k: int) -> None:
        try:
            with jax.transfer_guard("disallow"):
                while not self.stopping.is_set() and self._needed(k):
                    self._turn(k)
        except Exception as error:
            self.events.put(_Failure(k, error, traceback.format_exc()))
        else:
            self.doing[k] = "done"

    def _needed(self, k: int) -> bool:
        """Whether the module has updates to make, or a module above it that has."""
        return any(count < self.until for count in self.updates[k:])

    def _turn(self, k: int) -> None:
        """Takes a packet, updates (or only feeds, once done), hands on."""
        engine, clock, last = self.engine, self.engine.clock, len(self.states) - 1
        placement = engine.placement
        self.doing[k] = "waiting for a batch" if k == 0 else "waiting for a packet"
        begin = clock()
        if k == 0:
            incoming: Any = placement.put_batch(next(self.batches), 0)
            targets, sequence = incoming.targets, self.taken
            self.taken += 1
        else:
            sample = self._sample(k)
            if sample is None:
                return
            sequence = sample.packet.header.sequence
            incoming, targets = engine.fetch(k, self.flight.ring(k), sample.packet)
        done = self.updates[k] >= self.until
        self.doing[k] = "feeding the next module" if done else f"working on update {self.updates[k] + 1}"
        started = clock()
        engine.waited[k] += started - begin
        metrics: Metrics | None = None
        fresh = k in self.unpublished or (k < last and not done and engine.hops[k].publishes(self.updates[k]))
        with self.locks[k]:
            if done:
                coded = engine.feeds[k](self.states[k], incoming)
            else:
                # Donated, and there again once the update is whole: a step that fails leaves nothing that could be copied.
                state, self.states[k] = self.states[k], None
                state, coded, metrics = engine.programs[k](state, incoming, targets)
            payload, targets, codebook = jax.device_get(
                (coded.payload, targets, coded.codebook if fresh else None) if k < last else (None,) * 3
            )
            jax.block_until_ready(metrics)
            if not done:
                self.states[k] = state
            if k == 0:
                self.flight.batches = self.taken
        if engine.slowdown[k] > 1:
            self.stopping.wait((engine.slowdown[k] - 1) * (clock() - started))
        ended = clock()
        if metrics is not None:
            self._count(k, metrics, ended)
        if k < last:
            engine.meters[k].count(payload, targets, codebook)
            self.unpublished.discard(k)
            self.flight.add(k, payload, targets, Header(sequence, self.updates[k]), codebook)
        self.flight.turns.append((k, started - self.began, ended - self.began))
        self.progress[k] = ended

    def _sample(self, k: int) -> Any:
        """Waits until the ring has a packet that may be read; None once the run stops or nobody needs this module."""
        changed = self.flight.ring(k).changed
        with changed:
            changed.wait_for(lambda: self.stopping.is_set() or not self._needed(k) or self.flight.ring(k).ready())
        return None if self.stopping.is_set() or not self._needed(k) else self.flight.sample(k)

    def _count(self, k: int, metrics: Metrics, at: float) -> None:
        brought: list[Metrics] = [{} for _ in self.states]
        brought[k] = metrics
        with self.counting:
            self.updates[k] += 1
            self.engine._paces[k].updates += 1
            self.events.put(Report(tuple(self.updates), tuple(brought), self.snapshot, at, step=min(self.updates)))
        if self.updates[k] == self.until:  # a module below that only feeds may be needed no longer
            self._wake()

    def _wake(self) -> None:
        for ring in self.flight.rings:
            with ring.changed:
                ring.changed.notify_all()
