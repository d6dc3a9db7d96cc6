"""Ticks per second of a pipeline as predicted by a plan and as measured, for K = 2 and 3.

python benchmarks/plan/run.py [--write]

Every repeat first measures blocks, heads and each module's program alone, predicts the speed, and
then runs the pipeline with K modules on K CPU devices. The prediction from blocks and heads is the
one of `--mode=plan`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax import system
from dgl_jax.engines import EngineState
from dgl_jax.profile.timing import BlockTimes, block_times
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.run.parts import make_blocks
from dgl_jax.tools.bench import module_times
from dgl_jax.tools.pipeline import make_pipeline

MODULES = (2, 3)
WARM_UP = 5
LIMIT = 0.1  # how far a prediction may be off


def build(modules: int, split: str, args: argparse.Namespace) -> Experiment:
    """Builds the network with each module on a separate device."""
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__image_size=args.image_size,
        model__name=args.model,
        model__width=args.width,
        model__modules=modules,
        model__split=split,
        engine__name="pipeline",
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:modules])


def predicted(
    experiment: Experiment, seconds: list[float], processor: list[float], args: argparse.Namespace
) -> float:
    """Predicts the ticks per second of the full pipeline.

    Messages take no time, because the CPU devices of one host pass pointers.
    """
    pipeline, _ = make_pipeline(experiment.settings, seconds, processor, cores=args.cores)
    return pipeline.steady(experiment.spec.traffic().wire)[0]


def concurrency_of(experiment: Experiment, args: argparse.Namespace) -> int:
    """Returns the number of programs that work at the same time, as `--mode=plan` does."""
    return min(round(args.cores), len(experiment.spec.modules))


def from_blocks(experiment: Experiment, times: BlockTimes, args: argparse.Namespace) -> float:
    """Predicts the ticks per second from the times of blocks and heads."""
    starts = [module.first for module in experiment.spec.modules]
    seconds, processor = (costs.modules(starts) for costs in times)
    return predicted(experiment, seconds, processor, args)


def from_modules(experiment: Experiment, args: argparse.Namespace) -> float:
    """Measures the modules' programs one after the other and predicts the ticks per second."""
    elapsed = module_times(
        experiment, experiment.engine.init(), args.calls, concurrency_of(experiment, args)
    )
    return predicted(experiment, [e.seconds for e in elapsed], [e.processor for e in elapsed], args)


class Running:
    """Training with the pipeline's loop; each call continues where the last one ended."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.step = experiment, 0
        self.state: EngineState = experiment.engine.init()
        self(WARM_UP)

    def __call__(self, steps: int) -> float:
        """Measures ticks per second over the middle half of the steps (the pipeline is full)."""
        self.step += steps
        moments = []
        for report in self.experiment.engine.run(self.state, self.experiment.source, self.step):
            moments.append(time.perf_counter())
            last = report
        self.state = last.snapshot()
        jax.block_until_ready(self.state.modules)
        begin, end = len(moments) // 4, 3 * len(moments) // 4
        return (end - begin) / (moments[end] - moments[begin])


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", default="cnn6")
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--image_size", type=int, default=32)
    flags.add_argument(
        "--splits",
        nargs=2,
        default=["0,3", "0,2,4"],
        help="first blocks for K = 2 and K = 3, or count, flops",
    )
    flags.add_argument(
        "--cores", type=float, default=system.cpu_count(), help="cores that all devices share"
    )
    flags.add_argument("--calls", type=int, default=10, help="calls of each program per repeat")
    flags.add_argument("--steps", type=int, default=60, help="steps of the pipeline per repeat")
    flags.add_argument("--repeats", type=int, default=7)
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", max(MODULES))
    experiments = {k: build(k, split, args) for k, split in zip(MODULES, args.splits)}
    first = experiments[MODULES[0]]
    network, optimizer = make_blocks(first.settings, first.info), first.spec.optimizer
    running = {k: Running(each) for k, each in experiments.items()}
    blocks, predictions, runs = ({k: list[float]() for k in MODULES} for _ in range(3))
    for repeat in range(args.repeats):
        times = block_times(
            network, optimizer, jax.devices()[0], concurrency=concurrency_of(first, args)
        )
        for k in MODULES:
            blocks[k].append(from_blocks(experiments[k], times, args))
            predictions[k].append(from_modules(experiments[k], args))
            runs[k].append(running[k](args.steps))
        shown = {
            k: f"{blocks[k][-1]:.2f} and {predictions[k][-1]:.2f} predicted, "
            f"{runs[k][-1]:.2f} ticks/s"
            for k in MODULES
        }
        print(repeat, shown, flush=True)
    result: dict[str, Any] = {}
    rows = []
    for k in MODULES:
        ratios = {
            "modules": harness.quartiles(harness.ratios(predictions[k], runs[k])),
            "blocks": harness.quartiles(harness.ratios(blocks[k], runs[k])),
        }
        result[str(k)] = {
            "split": [module.first for module in experiments[k].spec.modules],
            "ticks_per_second": harness.quartiles(runs[k]),
            "predicted_from_modules": harness.quartiles(predictions[k]),
            "predicted_from_blocks": harness.quartiles(blocks[k]),
            "predicted_over_measured": ratios,
        }
        within = ["yes" if abs(q["median"] - 1) <= LIMIT else "NO" for q in ratios.values()]
        cells = [f"{harness.shown(q)} {w}" for q, w in zip(ratios.values(), within)]
        rows.append([k, harness.shown(harness.quartiles(runs[k])), *cells])
    harness.table(
        [
            "K",
            "ticks/s",
            f"predicted from modules over measured, within {LIMIT:.0%}",
            "from blocks",
        ],
        rows,
    )
    settings = {key: value for key, value in vars(args).items() if key != "write"}
    harness.finish(__file__, {"settings": settings, "results": result}, args.write)


if __name__ == "__main__":
    main()
