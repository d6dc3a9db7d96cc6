"""Time of small messages and sums between three processes, as `run.py` starts it on every host.

python benchmarks/hosts/calibrate.py COORDINATOR PROCESSES PROCESS

Process 0 prints a JSON object: milliseconds of one all-reduce of a small array (`all_reduce`),
milliseconds per tick of small messages that pass all processes one after the other, with the flow
control of the engine `pipeline` (`messages`), and their processor time per tick and process
(`processor`). Nothing is computed: these are times of the link, of JAX and of the flow control.
"""

import json
import sys
import time
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dgl_jax.engines import world
from dgl_jax.engines.pace import Pace
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.engines.transfer import distribute, is_here, placed_shapes, put

COUNT = 40  # sums, or ticks
WARM_UP = 10
AHEAD = 2  # engine.ticks_in_flight


def all_reduce() -> float:
    """Returns the seconds of an all-reduce of a float over all devices."""
    (mesh, *_) = one_group(jax.devices(), 1).groups
    split, whole = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (["batch"], []))
    x = distribute(jnp.arange(float(len(jax.devices()))), split)
    total = jax.jit(jnp.sum, out_shardings=whole)
    for _ in range(WARM_UP):
        total(x).block_until_ready()
    begin = time.perf_counter()
    for _ in range(COUNT):
        total(x).block_until_ready()
    return (time.perf_counter() - begin) / COUNT


def messages() -> tuple[float, float]:
    """Returns the seconds per tick in which each process sends one message to the next.

    The processes keep pace as in the engine `pipeline`.

    Returns:
      Wall time, and the mean processor time of a process.
    """
    count = world.count()
    placement = assign(jax.devices(), count)
    plus = jax.jit(lambda x: x + 1)
    held = [distribute(jnp.zeros(8), placement.split(k)) for k in range(count)]
    pace, flight = Pace(placement, AHEAD, lambda: False), deque[list[Any]]()

    def finish() -> None:
        jax.block_until_ready([x for x in flight.popleft() if is_here(x)])
        pace.finished()

    for tick in range(WARM_UP + COUNT):
        if tick == WARM_UP:
            begin, used = time.perf_counter(), time.process_time()
        pace.wait(tick)
        for k in reversed(range(count - 1)):  # the deepest first, as in the engine
            here = is_here(held[k])
            sent = plus(held[k]) if here else placed_shapes(held[k], placement.split(k))
            held[k + 1] = put(sent, placement.split(k + 1))
        flight.append(list(held))
        if len(flight) > AHEAD:
            finish()
    while flight:
        finish()
    world.barrier()
    seconds = (time.perf_counter() - begin) / COUNT
    every = world.exchange((time.process_time() - used) / COUNT)
    pace.close()
    return seconds, sum(every) / count


def main() -> None:
    coordinator, processes, process = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 1)
    world.join(coordinator, int(processes), int(process), on_cpu=True)
    with world.together():
        times = {"all_reduce": all_reduce()}
        times["messages"], times["processor"] = messages()
        if world.first():
            text = json.dumps({name: 1e3 * value for name, value in times.items()})
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
