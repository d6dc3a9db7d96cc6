"""Event simulation of a schedule: computes the begin and end of every turn, in plain Python.

A turn begins when three conditions hold: its device is free (the turns of a device keep their
dispatch order), its message has arrived, and the host, which runs a few ticks ahead of the devices,
has dispatched it. A hop carries one message at a time. Two modules, with `=` for transfers:

    device 0   | m0:b0 | m0:b1 | m0:b2 |
    hop                |===|   |===|   |===|
    device 1               | m1:b0     | m1:b1     | m1:b2     |

Devices that are threads of one machine share its cores. If the running turns use more cores than
there are, all of them slow down by the same factor.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dgl_jax.schedule import Tick, Turn


@dataclass(frozen=True)
class Work:
    """Cost of one turn of a module, and the device it runs on.

    Attributes:
      device: number of the device; modules may share one.
      seconds: duration of a turn of kind `step` if nothing else runs. A `forward` turn takes a
        third of it; a `backward` turn takes all of it, because it repeats the forward pass.
      transfer: seconds that the module's message takes to the next module.
      cores: host processors that the turn keeps busy; matters only if cores are limited.
      transfer_down: seconds that a message from the next module takes; None: as long as `transfer`.
    """

    device: int
    seconds: float
    transfer: float = 0.0
    cores: float = 1.0
    transfer_down: float | None = None


class Span(NamedTuple):
    """Begin and end of a turn, in seconds from the start of the run."""

    module: int
    batch: int
    begin: float
    end: float


@dataclass
class _Running:
    turn: Turn
    tick: int
    begin: float
    left: float  # seconds of work, at full speed


def simulate(
    ticks: Iterable[Tick],
    works: Sequence[Work],
    cores: float = math.inf,
    ticks_in_flight: int = 2,
    waiting_above: Sequence[int] = (),
) -> list[Span]:
    """Simulates a schedule and returns its turns in the order in which they end.

    Args:
      ticks: schedule of a method; every batch passes through all modules in order.
      works: one entry per module.
      cores: processors that all devices share.
      ticks_in_flight: tick t is dispatched when tick t - 1 - `ticks_in_flight` has ended, as in
        `run_ticks`.
      waiting_above: messages from above that wait at each module at the start, of which each `step`
        reads one: with n of them, the step on batch b reads the message of batch b - n. 0 or empty
        if steps read no such messages.
    """
    queues: dict[int, deque[tuple[int, Turn]]] = {work.device: deque() for work in works}
    unfinished: list[int] = []  # number of unfinished turns per tick
    for number, tick in enumerate(ticks):
        unfinished.append(len(tick))
        for turn in tick:
            queues[works[turn.module].device].append((number, turn))
    # Arrival time of messages; the key is (module, batch, True if the message comes from above).
    arrival: dict[tuple[int, int, bool], float] = {}
    link_free = [0.0] * len(works)
    lags = list(waiting_above) or [0] * len(works)
    running: dict[int, _Running] = {}
    now, done, spans = 0.0, 0, list[Span]()
    while running or any(queues.values()):
        waits = []
        for device, queue in queues.items():
            if device in running or not queue or queue[0][0] > done + ticks_in_flight:
                continue
            number, turn = queue[0]
            above = turn.kind == "backward"
            ready = (
                arrival.get((turn.module, turn.batch, above), math.inf)
                if turn.module or above
                else 0.0
            )
            lag = lags[turn.module]
            if turn.kind == "step" and 0 < lag <= turn.batch:
                ready = max(ready, arrival.get((turn.module, turn.batch - lag, True), math.inf))
            if ready <= now:
                queue.popleft()
                running[device] = _Running(
                    turn, number, now, works[turn.module].seconds / (1 if turn.updates() else 3)
                )
            else:
                waits.append(ready)
        speed = min(
            1.0, cores / max(sum(works[r.turn.module].cores for r in running.values()), 1e-12)
        )
        ends = {device: now + r.left / speed for device, r in running.items()}
        then = min([*ends.values(), *waits])
        assert then < math.inf, "the schedule has a turn whose message is never sent"
        for device, end in ends.items():
            current = running[device]
            if end > then:
                current.left -= (then - now) * speed
                continue
            del running[device]
            k, batch, kind = current.turn
            spans.append(Span(k, batch, current.begin, end))
            unfinished[current.tick] -= 1
            if kind != "backward":
                link_free[k] = max(link_free[k], end) + works[k].transfer
                arrival[k + 1, batch, False] = link_free[k]
            if kind != "forward" and k:
                below = works[k - 1]
                down = below.transfer if below.transfer_down is None else below.transfer_down
                arrival[k - 1, batch, True] = end + down
        while done < len(unfinished) and not unfinished[done]:
            done += 1
        now = then
    return spans


def waiting(spans: Iterable[Span], module: int) -> int:
    """Returns the peak number of messages that are in transit to, or held by, a module."""
    changes = []
    for span in spans:
        if span.module == module - 1:
            changes.append((span.end, 1))
        elif span.module == module:
            changes.append((span.end, -1))
    most = held = 0
    for _, change in sorted(changes):  # at equal times, used messages (-1) leave first
        held += change
        most = max(most, held)
    return most
