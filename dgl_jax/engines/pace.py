"""Flow control between the processes of a synchronous run, and their agreement to stop.

JAX sends as fast as a process calls it: nothing slows down a process whose readers fall behind. So
each process announces which ticks its devices have finished, and its neighbors follow. Nobody
dispatches a tick before the neighbors have finished the one `credit` ticks before.

    module 0:  tick 7 waits for tick 4 of module 1
    module 1:  tick 7 waits for tick 4 of modules 0 and 2         (credit 3)
"""

import itertools
import json
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from dgl_jax import waits
from dgl_jax.engines import world
from dgl_jax.engines.placement import Placement

_BLOCK = 4  # polls of `stop` that share a decision
_END = "end"
_FOLDER = 256  # publications; neighbors are apart by twice the largest credit (64) at most
_runs = itertools.count()


def _key(name: str, place: int) -> str:
    """Returns the key of a publication, in a folder that is removed as a whole."""
    return f"{name}/{place // _FOLDER}/{place}"


class Announcer:
    """Publishes the values of a stream, in order, from a thread, so that no caller waits.

    A publication takes two latencies of the network. Values that are put meanwhile are published
    together, so a slow network delays values but does not limit how many pass per second.

    Args:
      name: name of the stream.
      forget: True to remove old publications; the newest `_FOLDER` at least stay readable.
    """

    def __init__(self, name: str, forget: bool = False):
        self._name, self._forget = name, forget
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._publish, daemon=True)
        self._thread.start()

    def put(self, value: str = "") -> None:
        """Appends a value to the stream."""
        self._queue.put(value)

    def close(self) -> None:
        """Ends the stream and waits until everything is published."""
        self._queue.put(_END)
        waits.join(self._thread)

    def _publish(self) -> None:
        for place in itertools.count():
            values = [self._queue.get()]
            with suppress(queue.Empty):
                while True:
                    values.append(self._queue.get_nowait())
            world.publish(_key(self._name, place), json.dumps(values))
            if self._forget and place % _FOLDER == 0:  # one question for many publications
                world.forget(f"{self._name}/{place // _FOLDER - 2}/")
            if values[-1] == _END:
                return


class Follower:
    """Reads a stream ahead of its use, in a thread.

    Args:
      name: name of the stream.
    """

    def __init__(self, name: str):
        self._name = name
        self._values: list[str] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits until the stream has ended."""
        waits.join(self._thread)

    def get(self, place: int) -> str:
        """Returns a value of the stream, and waits for it; after the end the last one."""
        with self._changed:
            waits.wait_for(
                self._changed,
                lambda: len(self._values) > place or self._values[-1:] == [_END],
            )
            return self._values[min(place, len(self._values) - 1)]

    def _read(self) -> None:
        for place in itertools.count():
            values = json.loads(world.awaited(_key(self._name, place)))
            with self._changed:
                self._values += values
                self._changed.notify_all()
            if values[-1] == _END:
                return


class Pace:
    """Keeps the processes of one `run` of a synchronous engine in step.

    In a run of one process it does nothing.

    Args:
      placement: device groups of the modules.
      ahead: number of ticks that a neighbor may be behind.
      stop: returns True once this process has been asked to stop.
    """

    def __init__(self, placement: Placement, ahead: int, stop: Callable[[], bool]):
        self._stop, self._ahead = stop, ahead
        self._announcers: list[Announcer] = []
        self._neighbors: list[Follower] = []
        self._polls = 0
        self._stopped = False
        if world.count() == 1:
            return
        run, me = next(_runs), world.index()
        if world.first():
            world.forget(f"run/{run - 1}/")
        neighbors = placement.neighbors(me)
        if neighbors:
            ticks = f"run/{run}/ticks"
            self._announcers.append(Announcer(f"{ticks}/{me}", forget=True))
            self._neighbors = [Follower(f"{ticks}/{process}") for process in neighbors]
        self._decided = Follower(f"run/{run}/stop")
        self._decides = Announcer(f"run/{run}/stop") if world.first() else None

    def wait(self, tick: int) -> None:
        """Waits until a tick may be dispatched."""
        for neighbor in self._neighbors:
            if tick > self._ahead:
                neighbor.get(tick - self._ahead - 1)

    def finished(self) -> None:
        """Announces that the devices of this process have finished their next tick."""
        for announcer in self._announcers:
            announcer.put()

    def stop(self) -> bool:
        """Returns True once all processes stop; every process polls it equally often.

        The first process decides one block of polls in advance, so that the decision has arrived
        everywhere before it applies.
        """
        if world.count() == 1:
            return self._stop()
        block, place = divmod(self._polls, _BLOCK)
        self._polls += 1
        if place == 0 and not self._stopped:
            if self._decides is not None:
                asked = self._stop() or bool(world.published("signals"))
                self._decides.put("stop" if asked else "go")
            elif self._stop():
                world.signal()
            self._stopped = block > 0 and self._decided.get(block - 1) == "stop"
        return self._stopped

    def close(self) -> None:
        """Ends the streams; every process does so at the end of its `run`, unless it failed."""
        if world.count() > 1:
            for announcer in [*self._announcers, *([self._decides] if self._decides else [])]:
                announcer.close()
            for follower in [*self._neighbors, self._decided]:
                follower.close()
