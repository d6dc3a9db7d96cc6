"""Event simulation of a schedule: computes the begin and end of every turn, in plain Python.

A turn begins when three conditions hold: its device is free (the turns of a device keep their
dispatch order), its message has arrived, and the host, which runs a few ticks ahead of the devices,
has dispatched it. A hop carries one message at a time; each arrives a latency after its last byte
was sent. Two modules, with `=` for transfers:

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
      transfer: seconds that the link to the next module is busy with the module's message.
      cores: host processors that the turn keeps busy; matters only if cores are limited.
      transfer_down: seconds that a message from the next module takes; None: as long as `transfer`.
      latency: seconds from the end of a transfer to or from the next module until it has arrived.
      reduction: seconds in which the devices of the module add up their gradients, after the
        `seconds` of every turn that updates.
      host: seconds for which the host of the device sends and receives the messages of a turn. It
        dispatches its next turn afterwards.
    """

    device: int
    seconds: float
    transfer: float = 0.0
    cores: float = 1.0
    transfer_down: float | None = None
    latency: float = 0.0
    reduction: float = 0.0
    host: float = 0.0


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
    sends: float  # earliest time at which the host sends the messages of the turn


def simulate(
    ticks: Iterable[Tick],
    works: Sequence[Work],
    cores: float = math.inf,
    ticks_in_flight: int = 2,
    waiting_above: Sequence[int] = (),
    notice: float = 0.0,
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
      notice: seconds after which every host knows that a tick has ended.
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
    # Turns that wait for their device, with the time of their dispatch, and when each host is free.
    dispatched: dict[int, deque[tuple[float, int, Turn]]] = {device: deque() for device in queues}
    host_free = dict.fromkeys(queues, 0.0)
    now, done, known, spans = 0.0, 0, 0.0, list[Span]()
    while running or any(queues.values()) or any(dispatched.values()):
        waits = []
        for device, queue in queues.items():
            while queue and queue[0][0] <= done + ticks_in_flight:
                number, turn = queue.popleft()
                at = max(known, host_free[device])
                host_free[device] = at + works[turn.module].host
                dispatched[device].append((at, number, turn))
            if device in running or not dispatched[device]:
                continue
            at, number, turn = dispatched[device][0]
            above = turn.kind == "backward"
            ready = (
                arrival.get((turn.module, turn.batch, above), math.inf)
                if turn.module or above
                else 0.0
            )
            lag = lags[turn.module]
            if turn.kind == "step" and 0 < lag <= turn.batch:
                ready = max(ready, arrival.get((turn.module, turn.batch - lag, True), math.inf))
            ready = max(ready, at)
            if ready <= now:
                dispatched[device].popleft()
                work = works[turn.module]
                left = work.seconds + work.reduction if turn.updates() else work.seconds / 3
                running[device] = _Running(turn, number, now, left, at + work.host)
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
            sent = max(end, current.sends)
            if kind != "backward":
                link_free[k] = max(link_free[k], sent) + works[k].transfer
                arrival[k + 1, batch, False] = link_free[k] + works[k].latency
            if kind != "forward" and k:
                below = works[k - 1]
                down = below.transfer if below.transfer_down is None else below.transfer_down
                arrival[k - 1, batch, True] = sent + down + below.latency
        while done < len(unfinished) and not unfinished[done]:
            done, known = done + 1, then + notice
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
