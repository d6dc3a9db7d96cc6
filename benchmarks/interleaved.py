"""Interleaved timing of training variants, in this process or in processes bound to some cores."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from dgl_jax.engines import EngineState
from dgl_jax.engines.dispatches import steps_per_dispatch
from dgl_jax.run.build import Experiment

WARM_UP = 5


@dataclass(frozen=True)
class Timing:
    """Measurement of one repeat of one variant.

    Attributes:
      images_per_second: throughput, including the filling and draining of a pipeline.
      cores: processor seconds of the whole process per second.
    """

    images_per_second: float
    cores: float


Variant = Callable[[int], Timing]  # the argument is the number of steps


def timed(work: Callable[[], Any], images: int) -> Timing:
    """Times `work`, including the wait for the arrays that it returns."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Timing(images / wall, processor / wall)


def training(
    experiment: Experiment, ticks_in_flight: int | None = None, warm_up: int = WARM_UP
) -> Variant:
    """Returns a variant that runs the engine's loop; each call continues the same training.

    The number of steps of a call is rounded up to whole dispatches.
    """
    engine: Any = experiment.engine
    at_once = steps_per_dispatch(engine)
    # An asynchronous engine has no ticks.
    depth = ticks_in_flight or getattr(engine, "ticks_in_flight", None)
    state, step = engine.init(), 0

    def run(steps: int) -> Timing:
        nonlocal state, step
        steps = -(-steps // at_once) * at_once
        step += steps
        if depth is not None:
            engine.ticks_in_flight = depth

        def work() -> EngineState:
            for report in engine.run(state, experiment.source, step):
                last = report
            return last.snapshot()

        def keep() -> EngineState:
            nonlocal state
            state = work()
            return state

        return timed(keep, steps * experiment.spec.batch_size)

    run(warm_up)
    return run


class Process:
    """Variant that runs in a separate process, bound to some cores.

    The process runs the same script with the same flags plus `--serve=NAME`, see `serve`.

    Args:
      name: name of the variant.
      cores: numbers of the cores.
      warm_up: steps before the first timing.
      pool: threads of XLA's pool; by default one per core.
    """

    def __init__(
        self, name: str, cores: Sequence[int], warm_up: int = WARM_UP, pool: int | None = None
    ):
        threads = str(len(cores))
        self.process = subprocess.Popen(
            [
                "taskset",
                "-c",
                ",".join(map(str, cores)),
                sys.executable,
                *sys.argv,
                f"--serve={name}",
            ],
            env=os.environ | {"NPROC": str(pool or threads), "OMP_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self(warm_up)

    def __call__(self, steps: int) -> Timing:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return Timing(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """Ends the process and waits for it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(run: Variant) -> None:
    """Runs a variant for `Process`: reads numbers of steps and prints timings, one per line."""
    for line in sys.stdin:
        print(json.dumps(vars(run(int(line)))), flush=True)


def in_turns(
    variants: Mapping[str, Variant], steps: Mapping[str, int], repeats: int
) -> Iterator[dict[str, list[Timing]]]:
    """Yields all timings so far after each repeat; the first variant changes with every repeat."""
    timings: dict[str, list[Timing]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            timings[name].append(variants[name](steps[name]))
        print(
            repeat,
            {name: round(rows[-1].images_per_second, 1) for name, rows in timings.items()},
            flush=True,
        )
        yield timings
