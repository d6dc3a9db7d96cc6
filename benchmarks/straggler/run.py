"""Updates per second of one module while the other one is slowed, with `threads` and `pipeline`.

python benchmarks/straggler/run.py [--write]

Two modules of equal cost run on two CPU devices, one core per device. With `threads` the slowed
module waits (S - 1) times the duration of its step, and the other one should keep its speed. With
`pipeline` the next step of the slowed module is delayed by the same time, while the step of the
other module is already dispatched; both should slow down.
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
SLOWED = 1  # index of the slowed module, the deeper one


def build(engine: str, slowdown: float, args: Any) -> Experiment:
    """Builds the 6-layer CNN in two modules."""
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
        replay__size=args.ring_size,
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:2])


def threads(slowdown: float, args: Any) -> float:
    """Measures the updates per second of the module that is not slowed, after the warm-up."""
    experiment = build("threads", slowdown, args)
    other, rates = 1 - SLOWED, []
    begin, before = 0.0, 0
    for report in experiment.engine.run(
        experiment.engine.init(), experiment.source, 10**6, stop=lambda: bool(rates)
    ):
        done = report.updates[other]
        if not before and min(report.updates) >= WARM_UP:
            begin, before = time.perf_counter(), done
        elif before and report.metrics[other] and time.perf_counter() - begin >= args.seconds:
            rates.append((done - before) / (time.perf_counter() - begin))
    return rates[0]


def pipeline(slowdown: float, args: Any) -> float:
    """Measures ticks per second while the step of the slowed module takes S times as long."""
    experiment = build("pipeline", slowdown, args)
    engine: Any = experiment.engine
    program = engine.programs[SLOWED, "step"]
    newest: list[tuple[Any, float]] = []  # newest slowed step: its metrics and start time

    def slow(state: Any, incoming: Any, context: Any) -> Any:
        # The next step begins only when a device S times as slow would have ended this one; the
        # other device continues with what is already dispatched.
        if newest:
            metrics, start = newest.pop()
            jax.block_until_ready(metrics)
            time.sleep((slowdown - 1) * (time.perf_counter() - start))
        jax.block_until_ready(incoming)
        start = time.perf_counter()
        result = program(state, incoming, context)
        newest.append((result[2], start))
        return result

    state = engine.init()
    for report in engine.run(state, experiment.source, WARM_UP):
        last = report
    if slowdown > 1:
        engine.programs[SLOWED, "step"] = slow
    steps = max(10, round(args.seconds * args.rate / slowdown))
    state = last.snapshot()
    begin = time.perf_counter()
    for report in engine.run(state, experiment.source, WARM_UP + steps):
        last = report
    jax.block_until_ready(last.snapshot().modules)
    return steps / (time.perf_counter() - begin)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument(
        "--split",
        default="0,3",
        help="first blocks of the two modules; the default gives both the same cost",
    )
    flags.add_argument("--ring_size", type=int, default=10, help="messages per ring (M)")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=6.0)
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    args.rate = 10.0
    args.rate = pipeline(1.0, args)
    measured: dict[str, dict[float, list[float]]] = {
        name: {s: [] for s in SLOWDOWNS} for name in ("threads", "pipeline")
    }
    for repeat in range(args.repeats):
        order = SLOWDOWNS if repeat % 2 else SLOWDOWNS[::-1]
        for slowdown in order:
            measured["threads"][slowdown].append(threads(slowdown, args))
            measured["pipeline"][slowdown].append(pipeline(slowdown, args))
        print(
            repeat,
            {n: {s: round(v[-1], 1) for s, v in rates.items()} for n, rates in measured.items()},
            flush=True,
        )
    result: dict[str, Any] = {}
    rows = []
    for name, by_slowdown in measured.items():
        for slowdown, rates in by_slowdown.items():
            ratio = harness.quartiles(harness.ratios(rates, by_slowdown[1.0]))
            result.setdefault(name, {})[str(slowdown)] = {
                "updates_per_second": harness.quartiles(rates, 2),
                "over_s_1": ratio,
            }
            rows.append([name, slowdown, round(statistics.median(rates), 1), harness.shown(ratio)])
    harness.table(["engine", "S", "updates/s of the other module", "over its rate at S = 1"], rows)
    chosen = {
        key: getattr(args, key)
        for key in ("width", "batch_size", "split", "ring_size", "repeats", "seconds")
    }
    harness.finish(__file__, {"settings": chosen, "engines": result}, args.write)


if __name__ == "__main__":
    main()
