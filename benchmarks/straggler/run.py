"""Updates per second of one module while the other is slowed: `threads`, which must not care, beside `pipeline`, which must.

python benchmarks/straggler/run.py [--write]

Two modules of equal cost on two CPU devices, one core a device. Under `threads` the slowed module waits (S - 1) times its own step;
under `pipeline` its next step is held back for as long, while the other module's is already dispatched.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.run.build import Experiment, make_experiment

SLOWDOWNS = (1.0, 1.5, 2.0, 4.0)
WARM_UP = 5
SLOWED = 1  # the deeper module


def experiment(engine: str, slowdown: float, args: Any) -> Experiment:
    """The six-layer CNN cut in two."""
    slow = tuple(slowdown if k == SLOWED else 1.0 for k in range(2)) if engine == "threads" else ()
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__augment="crop_flip",
        model__name="cnn6",
        model__width=args.width,
        model__modules=2,
        model__split=args.split,
        engine__name=engine,
        engine__slowdown=slow,
        replay__size=args.packets,
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:2])


def threads(slowdown: float, args: Any) -> float:
    """Updates a second of the module that is not slowed, from its first update after the warm-up on."""
    made = experiment("threads", slowdown, args)
    other, told = 1 - SLOWED, []
    begin, before = 0.0, 0
    for report in made.engine.run(made.engine.init(), made.source, 10**6, stop=lambda: bool(told)):
        done = report.updates[other]
        if not before and min(report.updates) >= WARM_UP:
            begin, before = time.perf_counter(), done
        elif before and report.metrics[other] and time.perf_counter() - begin >= args.seconds:
            told.append((done - before) / (time.perf_counter() - begin))
    return told[0]


def pipeline(slowdown: float, args: Any) -> float:
    """Ticks a second; the slowed module's step takes S times as long, on its own device."""
    made = experiment("pipeline", slowdown, args)
    engine: Any = made.engine
    program = engine.programs[SLOWED, "step"]
    own: list[tuple[Any, float]] = []  # its newest step: metrics, and when it began

    def slow(state: Any, incoming: Any, context: Any) -> Any:
        # A device that takes S times as long: the next step begins only then, whatever else was dispatched meanwhile.
        if own:
            metrics, start = own.pop()
            jax.block_until_ready(metrics)
            time.sleep((slowdown - 1) * (time.perf_counter() - start))
        jax.block_until_ready(incoming)
        start = time.perf_counter()
        result = program(state, incoming, context)
        own.append((result[2], start))
        return result

    state = engine.init()
    for report in engine.run(state, made.source, WARM_UP):
        last = report
    if slowdown > 1:
        engine.programs[SLOWED, "step"] = slow
    steps = max(10, round(args.seconds * args.rate / slowdown))
    state = last.snapshot()
    begin = time.perf_counter()
    for report in engine.run(state, made.source, WARM_UP + steps):
        last = report
    jax.block_until_ready(last.snapshot().modules)
    return steps / (time.perf_counter() - begin)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--split", default="0,3", help="first blocks of the two modules: equal cost")
    flags.add_argument("--packets", type=int, default=10, help="M")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=6.0)
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    args.rate = 10.0
    args.rate = pipeline(1.0, args)
    found: dict[str, dict[float, list[float]]] = {
        name: {s: [] for s in SLOWDOWNS} for name in ("threads", "pipeline")
    }
    for repeat in range(args.repeats):
        order = SLOWDOWNS if repeat % 2 else SLOWDOWNS[::-1]
        for slowdown in order:
            found["threads"][slowdown].append(threads(slowdown, args))
            found["pipeline"][slowdown].append(pipeline(slowdown, args))
        print(
            repeat,
            {n: {s: round(v[-1], 1) for s, v in of.items()} for n, of in found.items()},
            flush=True,
        )
    result: dict[str, Any] = {}
    rows = []
    for name, of in found.items():
        for slowdown, rates in of.items():
            ratio = harness.quartiles(harness.ratios(rates, of[1.0]))
            result.setdefault(name, {})[str(slowdown)] = {
                "updates_per_second": harness.quartiles(rates, 2),
                "over_s_1": ratio,
            }
            rows.append([name, slowdown, round(statistics.median(rates), 1), harness.shown(ratio)])
    harness.table(["engine", "S", "updates/s of the other module", "over its S = 1"], rows)
    chosen = {
        key: getattr(args, key)
        for key in ("width", "batch_size", "split", "packets", "repeats", "seconds")
    }
    harness.finish(__file__, {"settings": chosen, "engines": result}, args.write)


if __name__ == "__main__":
    main()
