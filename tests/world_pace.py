"""Tries the flow control in one of three processes, without any training.

    python world_pace.py COORDINATOR PROCESS

The first process prints a JSON object.
"""

import json
import sys
import threading
from typing import Any

import jax

from dgl_jax.engines import world
from dgl_jax.engines.pace import Pace
from dgl_jax.engines.placement import assign

CREDIT, READY, TICKS = 2, 10, 50


def never() -> bool:
    """Returns False, as no process is asked to stop."""
    return False


def blocked_at(placement: Any, credit: bool) -> int:
    """Returns the tick that process 0 cannot dispatch while its reader has finished `READY`."""
    pace = Pace(placement, CREDIT, never)
    reached = 0
    if not credit:
        pace.wait = lambda tick: None  # type: ignore[method-assign]

    def produce() -> None:
        nonlocal reached
        for tick in range(TICKS):
            reached = tick
            pace.wait(tick)
            pace.finished()
        reached = TICKS

    if world.index() == 1:
        for _ in range(READY):
            pace.finished()
    stuck = TICKS
    if world.first():
        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(2)
        stuck = reached
    world.barrier()
    if world.index() == 1:
        for _ in range(READY, TICKS):
            pace.finished()
    if world.first():
        producer.join()
        assert reached == TICKS
    pace.close()
    return stuck


def stopped_at(placement: Any) -> list[int]:
    """Returns the poll at which each process stops after process 2 was asked to at its sixth."""
    polls = 0
    pace = Pace(placement, CREDIT, lambda: world.index() == 2 and polls >= 5)
    while not pace.stop():
        pace.wait(polls)
        pace.finished()
        polls += 1
    pace.close()
    return world.exchange(polls)


def main() -> None:
    """Runs both and prints the results."""
    jax.config.update("jax_num_cpu_devices", 1)
    world.join(sys.argv[1], 3, int(sys.argv[2]), heartbeat=10, on_cpu=True)
    with world.together():
        placement = assign(jax.devices(), 3)
        result = {
            "credit": blocked_at(placement, True),
            "no credit": blocked_at(placement, False),
            "stopped": stopped_at(placement),
            "union": world.merged({str(world.index()): world.index(), "all": world.index()}),
        }
        if world.first():
            print(json.dumps(result))


if __name__ == "__main__":
    main()
