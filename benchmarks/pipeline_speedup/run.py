"""Images per second of two modules on two devices over both on one, beside what the machine allows.

python benchmarks/pipeline_speedup/run.py [--write]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.engines import Engine, EngineState, PipelineEngine
from dgl_jax.experiment import Experiment, make_experiment
from dgl_jax.placement import put

WARM_UP = 5
ONE_CORE = "fused, process on one core"


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


def experiment(engine: str, devices: int, args: argparse.Namespace) -> Experiment:
    """The six-layer CNN cut in two, on the first `devices` devices."""
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__augment=args.augment,
        model__name=args.model,
        model__width=args.width,
        model__modules=2,
        model__split=args.split,
        engine__name=engine,
        engine__ticks_in_flight=args.ticks_in_flight,
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:devices])


def timed(work: Callable[[], Any], images: int) -> Timing:
    """Waits for what `work` returns."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Timing(images / wall, processor / wall)


def training(made: Experiment, ticks_in_flight: int | None = None) -> Variant:
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

        return timed(keep, steps * made.recipe.batch_size)

    run(WARM_UP)
    return run


def ceiling(made: Experiment) -> Variant:
    """The pipeline's two programs on their devices with no packet between them: each works on one input that is there."""
    engine = made.engine
    assert isinstance(engine, PipelineEngine)
    states = list(engine.init().modules)
    batch = engine.placement.put_batch(made.source.batch(0), 0)
    states[0], payload, _ = engine.programs[0](states[0], batch, batch.targets)
    inputs = [(batch, batch.targets), put((payload, batch.targets), engine.placement.split(1))]

    def work(steps: int) -> list[Any]:
        waiting: deque[list[Any]] = deque()
        for _ in range(steps):
            metrics = []
            for k in (1, 0):
                states[k], _, of_module = engine.programs[k](states[k], *inputs[k])
                metrics.append(of_module)
            waiting.append(metrics)
            if len(waiting) > engine.ticks_in_flight:
                jax.block_until_ready(waiting.popleft())
        return states

    run = lambda steps: timed(lambda: work(steps), steps * made.recipe.batch_size)  # noqa: E731
    run(WARM_UP)
    return run


def alone(engine: Engine, made: Experiment, repeats: int) -> list[float]:
    """Median milliseconds of each module's program by itself, nothing else running."""
    assert isinstance(engine, PipelineEngine)
    states, found = list(engine.init().modules), []
    batch = engine.placement.put_batch(made.source.batch(0), 0)
    incoming: Any = (batch, batch.targets)
    for k, program in enumerate(engine.programs):
        incoming = incoming if k == 0 else put(incoming, engine.placement.split(k))
        taken = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            states[k], payload, _ = jax.block_until_ready(program(states[k], *incoming))
            taken.append(1e3 * (time.perf_counter() - begin))
        incoming = (payload, batch.targets)
        found.append(round(statistics.median(taken[2:]), 2))
    return found


class OneCore:
    """`fused` in a process of its own that may use one core only."""

    def __init__(self, args: argparse.Namespace):
        core = min(os.sched_getaffinity(0))
        self.process = subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, __file__, *sys.argv[1:], "--serve"],
            env=os.environ | {"NPROC": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self(WARM_UP)

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


def serve(args: argparse.Namespace) -> None:
    """The other side of `OneCore`: a line with the number of steps in, a line with the timing out."""
    run = training(experiment("fused", 1, args))
    for line in sys.stdin:
        print(json.dumps(vars(run(int(line)))), flush=True)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", default="cnn6", choices=["cnn6", "cnn6_replay"])
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--augment", default="crop_flip", choices=["none", "crop_flip"])
    flags.add_argument("--split", default="0,3", help="first blocks of the two modules, chosen so that both cost about the same")
    flags.add_argument("--ticks_in_flight", type=int, default=2)
    flags.add_argument("--sweep", action="store_true", help="also the pipeline with 1 to 4 ticks in flight")
    flags.add_argument("--probe", action="store_true", help="only print what both modules take by themselves, for three splits")
    flags.add_argument("--repeats", type=int, default=15)
    flags.add_argument("--seconds", type=float, default=3.0, help="least length of a repeat")
    flags.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.serve:
        return serve(args)
    jax.config.update("jax_num_cpu_devices", 2)
    if args.probe:
        for first in (2, 3, 4):
            made = experiment("pipeline", 2, argparse.Namespace(**vars(args) | {"split": f"0,{first}"}))
            print(f"split 0,{first}:", alone(made.engine, made, 10), "ms", flush=True)
        return None

    one, two = experiment("pipeline", 1, args), experiment("pipeline", 2, args)
    one_core = OneCore(args)
    variants: dict[str, Variant] = {
        "fused": training(experiment("fused", 1, args)),
        ONE_CORE: one_core,
        "pipeline, one device": training(one),
        "pipeline": training(two),
        "ceiling": ceiling(two),
    }
    if args.sweep:
        variants |= {f"pipeline, {depth} in flight": training(two, depth) for depth in (1, 2, 3, 4)}
    module_milliseconds = alone(two.engine, two, 20)
    fastest = max(variants["pipeline"](20).images_per_second, variants["ceiling"](20).images_per_second)
    steps = max(20, round(args.seconds * fastest / args.batch_size))
    seconds = sum(steps * args.batch_size / variants[name](10).images_per_second for name in variants)
    about = f"{steps} steps a repeat, {args.repeats} repeats, about {args.repeats * seconds:.0f} s"
    print(f"modules alone: {module_milliseconds} ms; {about}", flush=True)
    chosen = {k: v for k, v in vars(args).items() if k not in ("write", "serve", "probe")}

    timings: dict[str, list[Timing]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(args.repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:  # nobody always comes first
            timings[name].append(variants[name](steps))
        print(repeat, {name: round(found[-1].images_per_second) for name, found in timings.items()}, flush=True)
        if repeat >= 2:  # a run that is cut short leaves what it has
            result = summarise(timings, steps) | {"module_milliseconds": module_milliseconds, "settings": chosen}
            harness.finish(__file__, result, args.write)
    one_core.close()
    rows = [[name, *(harness.shown(q) for q in found.values())] for name, found in result["variants"].items()]
    harness.table(["variant", "images/s", "cores used", "over fused", "over fused on one core", "over ceiling"], rows)
    print("pipeline over ceiling, filling and draining left out:", harness.shown(result["pipeline_over_ceiling_without_filling"]))
    return None


def summarise(timings: dict[str, list[Timing]], steps: int) -> dict[str, Any]:
    """Medians and quartiles of every variant, and of its ratios repeat by repeat."""
    speed = {name: [t.images_per_second for t in found] for name, found in timings.items()}
    # A pipeline of two takes one tick more than it trains batches.
    full = [r * (steps + 1) / steps for r in harness.ratios(speed["pipeline"], speed["ceiling"])]
    return {
        "repeats": len(speed["fused"]),
        "steps": steps,
        "variants": {
            name: {
                "images_per_second": harness.quartiles(speed[name], 1),
                "cores": harness.quartiles([t.cores for t in found]),
                "over_fused": harness.quartiles(harness.ratios(speed[name], speed["fused"])),
                "over_fused_on_one_core": harness.quartiles(harness.ratios(speed[name], speed[ONE_CORE])),
                "over_ceiling": harness.quartiles(harness.ratios(speed[name], speed["ceiling"])),
            }
            for name, found in timings.items()
        },
        "pipeline_over_ceiling_without_filling": harness.quartiles(full),
    }


if __name__ == "__main__":
    main()
