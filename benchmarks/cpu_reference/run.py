"""Images per second of the 6-layer CNN in JAX and of the same training in PyTorch, on CPU cores.

pip install torch
python benchmarks/cpu_reference/run.py [--write]
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
from interleaved import Process, Timing, Variant, in_turns, serve, timed, training

from dgl_jax import means, system
from dgl_jax.run.build import Experiment, make_experiment

CORES = {"one core": 1, "two cores": 2}
ENGINE = {"one core": "fused", "two cores": "pipeline"}
PASS = 1.0  # least ratio of `pipeline` on two devices over PyTorch on two threads
WARM_UP = 2
# Tolerances of `check`; see README.md, "How it is measured".
STEPS = 3
LOSS = 1e-5
UPDATE = 3e-2


@dataclass(frozen=True)
class Side:
    """Side of a comparison: a library on a number of cores."""

    width: int
    cores: str  # a key of CORES
    library: str  # JAX or PyTorch

    def __str__(self) -> str:
        return f"width {self.width}, {self.cores}, {self.library}"


def build(side: Side, args: argparse.Namespace) -> Experiment:
    """Builds the experiment, which is the same for both libraries."""
    two = side.cores == "two cores"
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        model__name="cnn6",
        model__width=side.width,
        model__modules=2 if two else 6,
        model__split=args.split if two else "count",
        engine__name=ENGINE[side.cores],
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[: CORES[side.cores]])


def torch_training(experiment: Experiment, memory_format: str) -> Variant:
    """Returns the PyTorch counterpart of `training`, with the same source of batches."""
    # Imported here, so that the processes of the JAX side never load PyTorch.
    from torch_dgl import counterpart

    network, done = counterpart(experiment, memory_format), 0

    def run(steps: int) -> Timing:
        nonlocal done
        batches = experiment.source.batches(done)
        done += steps

        def work() -> list[float]:
            for _, batch in zip(range(steps), batches):
                losses = network.step(batch.inputs, batch.context["label"])
            return [float(loss) for loss in losses]

        return timed(work, steps * experiment.spec.batch_size)

    return run


def check(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Compares losses and updates of both libraries over a few steps.

    Every step starts with equal parameters, because rounding errors would grow over many steps;
    only the momentum buffers are never copied.

    Returns:
      A dictionary with
        losses: relative difference per batch, the largest of all modules.
        update: distance per parameter update in units of the length of the update, the largest of
          all arrays.

    Raises:
      SystemExit: if the difference is too large, or if the check also passes without momentum,
        which shows that it detects nothing.
    """
    from torch_dgl import counterpart

    experiment = build(side, args)
    state = experiment.engine.init()
    params, losses = [[jax.device_get(module.params) for module in state.modules]], []
    for step in range(STEPS):
        (report,) = experiment.engine.run(state, experiment.source, step + 1)
        state = report.snapshot()
        params.append([jax.device_get(module.params) for module in state.modules])
        losses.append([float(means(metrics)["loss"]) for metrics in report.metrics])

    def differences(**changed: float) -> dict[str, Any]:
        network = counterpart(experiment, args.memory_format, **changed)
        result: dict[str, Any] = {"losses": [], "update": []}
        for step, (before, after, expected) in enumerate(
            zip(params, params[1:], losses, strict=False)
        ):
            network.copy_from(before)
            batch = experiment.source.batch(step)
            pairs = zip(network.step(batch.inputs, batch.context["label"]), expected, strict=True)
            result["losses"].append(
                max(abs(float(loss) / reference - 1) for loss, reference in pairs)
            )
            result["update"].append(max(network.distances(before, after)))
        return result

    def agree(result: dict[str, Any]) -> bool:
        return max(result["update"]) < UPDATE and max(result["losses"]) < LOSS

    result, broken = differences(), differences(momentum=0.0)
    if not agree(result):
        raise SystemExit(f"{side}: the two libraries do not compute the same: {result}")
    if agree(broken):
        raise SystemExit(f"{side}: the check does not notice that momentum is missing: {broken}")
    return result


def variant(side: Side, args: argparse.Namespace) -> Variant:
    """Returns the variant that the process of one side runs."""
    if side.library == "JAX":
        return training(build(side, args), warm_up=1)
    import torch

    torch.set_num_threads(CORES[side.cores])
    return torch_training(build(side, args), args.memory_format)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    flags.add_argument("--batch_size", type=int, default=128)
    flags.add_argument(
        "--split", default="0,3", help="first blocks of the two modules on two cores"
    )
    flags.add_argument("--cores", nargs="+", choices=CORES, default=list(CORES))
    flags.add_argument(
        "--memory_format",
        choices=["channels_last", "contiguous"],
        default="channels_last",
        help="memory format of PyTorch",
    )
    flags.add_argument("--repeats", type=int, default=9)
    flags.add_argument("--seconds", type=float, default=5.0, help="least length of a repeat")
    flags.add_argument(
        "--least_steps",
        type=int,
        default=20,
        help="least steps of a repeat on two cores, where it also fills and drains the pipeline",
    )
    flags.add_argument(
        "--first_core",
        type=int,
        default=min(system.usable_cpus() or [0]),
        help="core for the measurements on one core",
    )
    flags.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = flags.parse_args()
    sides = {
        str(side): side
        for side in (
            Side(w, c, lib) for w in args.widths for c in args.cores for lib in ("JAX", "PyTorch")
        )
    }
    jax.config.update("jax_num_cpu_devices", max(CORES[side.cores] for side in sides.values()))
    if args.serve:
        side = sides[args.serve]
        jax.config.update("jax_num_cpu_devices", CORES[side.cores])
        return serve(variant(side, args))

    measured = {
        k: v for k, v in vars(args).items() if k not in ("write", "serve", "widths", "cores")
    }
    before = Path(__file__).with_name("result.json")
    previous = json.loads(before.read_text())["comparisons"] if before.exists() else {}
    results: dict[str, Any] = {}
    for width in args.widths:
        for cores in args.cores:
            pair = {lib: Side(width, cores, lib) for lib in ("JAX", "PyTorch")}
            agreement = check(pair["JAX"], args)
            print(f"width {width}, {cores}: both sides compute the same, {agreement}", flush=True)
            results[f"width {width}, {cores}"] = {
                "settings": measured,
                "agreement": agreement,
            } | compared(pair, args)
            # Written after each comparison, so that an interrupted run keeps what it measured.
            # Comparisons that are not measured in this run keep their previous results.
            harness.finish(__file__, {"comparisons": previous | results}, args.write)
    rows = [
        [
            name,
            *(
                harness.shown(result[column])
                for column in ("JAX", "PyTorch", "ratio", "ratio_without_filling")
            ),
        ]
        for name, result in results.items()
    ]
    harness.table(
        [
            "",
            "JAX, images/s",
            "PyTorch, images/s",
            "JAX over PyTorch",
            "without filling and draining",
        ],
        rows,
    )
    return None


def compared(pair: dict[str, Side], args: argparse.Namespace) -> dict[str, Any]:
    """Times both sides in turns, each in a process bound to its cores."""
    count = CORES[pair["JAX"].cores]
    cores = (
        [args.first_core] if count == 1 else (system.usable_cpus() or list(range(count)))[:count]
    )
    with contextlib.ExitStack() as stack:
        variants: dict[str, Variant] = {}
        for library, side in pair.items():
            process = Process(str(side), cores, WARM_UP)
            stack.callback(process.close)
            variants[library] = process
        fastest = max(run(WARM_UP).images_per_second for run in variants.values())
        steps = max(
            args.least_steps if count > 1 else 1, round(args.seconds * fastest / args.batch_size)
        )
        timings = list(in_turns(variants, dict.fromkeys(variants, steps), args.repeats))[-1]
    speed = {library: [t.images_per_second for t in rows] for library, rows in timings.items()}
    ratios = harness.ratios(speed["JAX"], speed["PyTorch"])
    ticks = steps + count - 1  # a pipeline of two modules needs one extra tick
    return {
        "steps": steps,
        **{library: harness.quartiles(rates, 1) for library, rates in speed.items()},
        "cores": {
            library: harness.quartiles([t.cores for t in rows]) for library, rows in timings.items()
        },
        "ratio": harness.quartiles(ratios),
        "ratio_without_filling": harness.quartiles([r * ticks / steps for r in ratios]),
    } | ({"pass": PASS} if count > 1 else {})


if __name__ == "__main__":
    main()
