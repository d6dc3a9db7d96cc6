"""Timing several ways of training in turns within one run, some of them in a process of their own with cores of its own."""

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
from dgl_jax.run.build import Experiment

WARM_UP = 5


@dataclass(frozen=True)
class Timing:
    """One repeat of one variant.

    Attributes:
      images_per_second: filling and draining included.
      cores: processor seconds of the whole process per second.
    """

    images_per_second: float
    cores: float


Variant = Callable[[int], Timing]  # from the number of steps


def timed(work: Callable[[], Any], images: int) -> Timing:
    """Waits for what `work` returns."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Timing(images / wall, processor / wall)


def training(
    made: Experiment, ticks_in_flight: int | None = None, warm_up: int = WARM_UP
) -> Variant:
    """The engine's own loop; each call trains on from where the last one ended."""
    engine: Any = made.engine
    depth, state, step = ticks_in_flight or engine.ticks_in_flight, engine.init(), 0

    def run(steps: int) -> Timing:
        nonlocal state, step
        step += steps
        engine.ticks_in_flight = depth

        def work() -> EngineState:
            for report in engine.run(state, made.source, step):
                last = report
            return last.snapshot()

        def keep() -> EngineState:
            nonlocal state
            state = work()
            return state

        return timed(keep, steps * made.spec.batch_size)

    run(warm_up)
    return run


class Process:
    """A variant in a process of its own: this same script with the same flags and `--serve=NAME`, bound to some cores."""

    def __init__(self, name: str, cores: Sequence[int], warm_up: int = WARM_UP):
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
            env=os.environ | {"NPROC": threads, "OMP_NUM_THREADS": threads},
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
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(run: Variant) -> None:
    """The other side of `Process`: a line with the number of steps in, a line with the timing out."""
    for line in sys.stdin:
        print(json.dumps(vars(run(int(line)))), flush=True)


def in_turns(
    variants: Mapping[str, Variant], steps: Mapping[str, int], repeats: int
) -> Iterator[dict[str, list[Timing]]]:
    """All timings so far, after each repeat; a different variant begins each, so that nobody always comes first."""
    timings: dict[str, list[Timing]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            timings[name].append(variants[name](steps[name]))
        print(
            repeat,
            {name: round(found[-1].images_per_second, 1) for name, found in timings.items()},
            flush=True,
        )
        yield timings
