"""When every turn of a schedule begins and ends, if modules, devices and links take their stated time. Plain Python.

An event simulation: a turn begins once its device is free (turns of a device keep the order of their dispatch), its packet has
arrived, and the host, which runs a few ticks ahead of the devices, has dispatched it. A hop carries one packet after the other.
Devices that are threads of one machine share its cores: where the turns under way would use more of them than there are, all slow
down alike.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dgl_jax.schedule import Tick, Turn


@dataclass(frozen=True)
class Work:
    """A module's part.

    Attributes:
      device: on which it works; modules may share one.
      seconds: its turn of kind `step`, when nothing else runs. A forward pass takes a third of it; a `backward` turn as long, since
        it makes the forward pass again.
      transfer: seconds that its packet takes to the next module.
      cores: processors of the host that its turn keeps busy meanwhile; matters only where cores are limited.
    """

    device: int
    seconds: float
    transfer: float = 0.0
    cores: float = 1.0


class Span(NamedTuple):
    """A turn in time, in seconds from the start."""

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
    ticks: Iterable[Tick], works: Sequence[Work], cores: float = math.inf, ticks_in_flight: int = 2
) -> list[Span]:
    """Every turn of a schedule in time, in the order in which they end.

    Args:
      ticks: of a method's schedule; every batch passes all the modules in order.
      works: one a module.
      cores: processors that all devices share.
      ticks_in_flight: tick t is dispatched once tick t - 1 - `ticks_in_flight` is done, as `run_ticks` does.
    """
    queues: dict[int, deque[tuple[int, Turn]]] = {work.device: deque() for work in works}
    unfinished: list[int] = []  # turns of each tick
    for number, tick in enumerate(ticks):
        unfinished.append(len(tick))
        for turn in tick:
            queues[works[turn.module].device].append((number, turn))
    arrival: dict[
        tuple[int, int, bool], float
    ] = {}  # of what a turn needs: module, batch, whether it comes from above
    link_free = [0.0] * len(works)
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
        assert then < math.inf, "the schedule gives a turn to a module whose packet is never made"
        for device, end in ends.items():
            found = running[device]
            if end > then:
                found.left -= (then - now) * speed
                continue
            del running[device]
            k, batch, kind = found.turn
            spans.append(Span(k, batch, found.begin, end))
            unfinished[found.tick] -= 1
            if kind != "backward":
                link_free[k] = max(link_free[k], end) + works[k].transfer
                arrival[k + 1, batch, False] = link_free[k]
            if kind != "forward" and k:
                arrival[k - 1, batch, True] = end + works[k - 1].transfer
        while done < len(unfinished) and not unfinished[done]:
            done += 1
        now = then
    return spans


def waiting(spans: Iterable[Span], module: int) -> int:
    """The most packets that there are at once between a module's producer and the end of its own turn: on their way, or held."""
    changes = []
    for span in spans:
        if span.module == module - 1:
            changes.append((span.end, 1))
        elif span.module == module:
            changes.append((span.end, -1))
    most = held = 0
    for _, change in sorted(changes):  # what ends makes room first
        held += change
        most = max(most, held)
    return most
