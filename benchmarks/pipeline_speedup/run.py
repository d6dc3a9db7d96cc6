"""Images per second of two modules on two devices, over one device and over the machine's limit.

python benchmarks/pipeline_speedup/run.py [--write]
"""

import argparse
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
from interleaved import WARM_UP, Process, Timing, Variant, in_turns, serve, timed, training

from dgl_jax import system
from dgl_jax.engines import Engine, PipelineEngine
from dgl_jax.engines.transfer import put
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.types import Inbox

ONE_CORE = "fused, process on one core"


def build(engine: str, devices: int, args: argparse.Namespace) -> Experiment:
    """Builds the 6-layer CNN in two modules on the first `devices` devices."""
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


def ceiling(experiment: Experiment) -> Variant:
    """Returns a variant that runs both programs on fixed inputs, without any messages."""
    engine = experiment.engine
    assert isinstance(engine, PipelineEngine)
    states = list(engine.init().modules)
    batch = engine.placement.put_batch(experiment.source.batch(0), 0)
    programs = harness.programs(engine)
    states[0], (message, _), _ = programs[0](states[0], Inbox(batch), batch.context)
    inputs = [
        (Inbox(batch), batch.context),
        put((Inbox(message), batch.context), engine.placement.split(1)),
    ]

    def work(steps: int) -> list[Any]:
        waiting: deque[list[Any]] = deque()
        for _ in range(steps):
            metrics = []
            for k in (1, 0):
                states[k], _, module_metrics = programs[k](states[k], *inputs[k])
                metrics.append(module_metrics)
            waiting.append(metrics)
            if len(waiting) > engine.ticks_in_flight:
                jax.block_until_ready(waiting.popleft())
        return states

    def run(steps: int) -> Timing:
        return timed(lambda: work(steps), steps * experiment.spec.batch_size)

    run(WARM_UP)
    return run


def alone(engine: Engine, experiment: Experiment, repeats: int) -> list[float]:
    """Measures the median milliseconds of each module's program when it runs alone."""
    assert isinstance(engine, PipelineEngine)
    states, medians = list(engine.init().modules), []
    batch = engine.placement.put_batch(experiment.source.batch(0), 0)
    incoming: Any = (Inbox(batch), batch.context)
    for k, program in enumerate(harness.programs(engine)):
        incoming = incoming if k == 0 else put(incoming, engine.placement.split(k))
        times = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            states[k], (message, _), _ = jax.block_until_ready(program(states[k], *incoming))
            times.append(1e3 * (time.perf_counter() - begin))
        incoming = (Inbox(message), batch.context)
        medians.append(round(statistics.median(times[2:]), 2))
    return medians


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", default="cnn6", choices=["cnn6", "cnn6_replay"])
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--augment", default="crop_flip", choices=["none", "crop_flip"])
    flags.add_argument(
        "--split",
        default="0,3",
        help="first blocks of the two modules; the default gives both about the same cost",
    )
    flags.add_argument("--ticks_in_flight", type=int, default=2)
    flags.add_argument(
        "--sweep", action="store_true", help="also measure the pipeline with 1 to 4 ticks in flight"
    )
    flags.add_argument(
        "--probe",
        action="store_true",
        help="only print the times of both modules alone, for three splits",
    )
    flags.add_argument("--repeats", type=int, default=15)
    flags.add_argument("--seconds", type=float, default=3.0, help="least length of a repeat")
    flags.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.serve:
        return serve(training(build("fused", 1, args)))
    jax.config.update("jax_num_cpu_devices", 2)
    if args.probe:
        for first in (2, 3, 4):
            experiment = build(
                "pipeline", 2, argparse.Namespace(**vars(args) | {"split": f"0,{first}"})
            )
            print(f"split 0,{first}:", alone(experiment.engine, experiment, 10), "ms", flush=True)
        return None

    one, two = build("pipeline", 1, args), build("pipeline", 2, args)
    one_core = Process(ONE_CORE, [min(system.usable_cpus() or [0])])
    variants: dict[str, Variant] = {
        "fused": training(build("fused", 1, args)),
        ONE_CORE: one_core,
        "pipeline, one device": training(one),
        "pipeline": training(two),
        "ceiling": ceiling(two),
    }
    if args.sweep:
        variants |= {f"pipeline, {depth} in flight": training(two, depth) for depth in (1, 2, 3, 4)}
    module_milliseconds = alone(two.engine, two, 20)
    fastest = max(
        variants["pipeline"](20).images_per_second, variants["ceiling"](20).images_per_second
    )
    steps = max(20, round(args.seconds * fastest / args.batch_size))
    seconds = sum(
        steps * args.batch_size / variants[name](10).images_per_second for name in variants
    )
    about = (
        f"{steps} steps per repeat, {args.repeats} repeats, about {args.repeats * seconds:.0f} s"
    )
    print(f"modules alone: {module_milliseconds} ms; {about}", flush=True)
    chosen = {k: v for k, v in vars(args).items() if k not in ("write", "serve", "probe")}

    for timings in in_turns(variants, dict.fromkeys(variants, steps), args.repeats):
        if len(timings["fused"]) > 2:  # so that an interrupted run keeps its result
            result = summarize(timings, steps) | {
                "module_milliseconds": module_milliseconds,
                "settings": chosen,
            }
            harness.finish(__file__, result, args.write)
    one_core.close()
    rows = [
        [name, *(harness.shown(q) for q in columns.values())]
        for name, columns in result["variants"].items()
    ]
    harness.table(
        [
            "variant",
            "images/s",
            "cores used",
            "over fused",
            "over fused on one core",
            "over ceiling",
        ],
        rows,
    )
    print(
        "pipeline over ceiling, without filling and draining:",
        harness.shown(result["pipeline_over_ceiling_without_filling"]),
    )
    return None


def summarize(timings: dict[str, list[Timing]], steps: int) -> dict[str, Any]:
    """Computes quartiles of the speed of every variant and of its ratios to the others."""
    speed = {name: [t.images_per_second for t in rows] for name, rows in timings.items()}
    # A pipeline of two modules needs one extra tick.
    full = [r * (steps + 1) / steps for r in harness.ratios(speed["pipeline"], speed["ceiling"])]
    return {
        "repeats": len(speed["fused"]),
        "steps": steps,
        "variants": {
            name: {
                "images_per_second": harness.quartiles(speed[name], 1),
                "cores": harness.quartiles([t.cores for t in rows]),
                "over_fused": harness.quartiles(harness.ratios(speed[name], speed["fused"])),
                "over_fused_on_one_core": harness.quartiles(
                    harness.ratios(speed[name], speed[ONE_CORE])
                ),
                "over_ceiling": harness.quartiles(harness.ratios(speed[name], speed["ceiling"])),
            }
            for name, rows in timings.items()
        },
        "pipeline_over_ceiling_without_filling": harness.quartiles(full),
    }


if __name__ == "__main__":
    main()
