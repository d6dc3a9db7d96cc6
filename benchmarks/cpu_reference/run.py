"""Images per second of the 6-layer CNN beside the same networks, heads and updates in PyTorch: one core, and two.

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
PASS = 1.0  # pipeline on two devices over PyTorch on two threads
WARM_UP = 2
# How near both sides must be; see README.md, "How it is measured".
STEPS = 3
LOSS = 1e-5
UPDATE = 3e-2


@dataclass(frozen=True)
class Way:
    """One side of a comparison."""

    width: int
    cores: str  # a key of CORES
    library: str  # JAX or PyTorch

    def __str__(self) -> str:
        return f"width {self.width}, {self.cores}, {self.library}"


def experiment(way: Way, args: argparse.Namespace) -> Experiment:
    """The same for both libraries."""
    two = way.cores == "two cores"
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        model__name="cnn6",
        model__width=way.width,
        model__modules=2 if two else 6,
        model__split=args.split if two else "count",
        engine__name=ENGINE[way.cores],
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[: CORES[way.cores]])


def torch_network(made: Experiment, memory_format: str, **changed: float) -> Any:
    """The `torch_dgl.DGL` of an experiment."""
    # Here, so that the processes of the JAX side never load it.
    from torch_dgl import DGL

    settings, data = made.settings.optimizer, made.source
    update = {
        "rate": settings.learning_rate,
        "momentum": settings.momentum,
        "decay": settings.weight_decay,
    }
    return DGL(
        made.settings.model.width,
        [module.first for module in made.spec.modules],
        data.example_shape[0],
        data.num_classes,
        **update | changed,
        mean=data.mean,
        std=data.std,
        channels_last=memory_format == "channels_last",
    )


def torch_training(made: Experiment, memory_format: str) -> Variant:
    """As `training`, in PyTorch, from the same source of batches."""
    network, done = torch_network(made, memory_format), 0

    def run(steps: int) -> Timing:
        nonlocal done
        batches = made.source.batches(done)
        done += steps

        def work() -> list[float]:
            for _, batch in zip(range(steps), batches):
                losses = network.step(batch.inputs, batch.context["label"])
            return [float(loss) for loss in losses]

        return timed(work, steps * made.spec.batch_size)

    return run


def check(way: Way, args: argparse.Namespace) -> dict[str, Any]:
    """How far apart both sides are in each of a few steps, every one of which begins with the same parameters.

    Over many steps rounding would grow; momentum stays each side's own.

    Returns:
      `losses`: relative, the largest of all modules, of each batch.
      `update`: of each update of parameters; the largest of all arrays, in units of the length of its update.

    Raises:
      SystemExit: too far; or no further without momentum, which shows that the check sees nothing.
    """
    made = experiment(way, args)
    state = made.engine.init()
    params, losses = [[jax.device_get(module.params) for module in state.modules]], []
    for step in range(STEPS):
        (report,) = made.engine.run(state, made.source, step + 1)
        state = report.snapshot()
        params.append([jax.device_get(module.params) for module in state.modules])
        losses.append([float(means(of_module)["loss"]) for of_module in report.metrics])

    def apart(**changed: float) -> dict[str, Any]:
        network = torch_network(made, args.memory_format, **changed)
        found: dict[str, Any] = {"losses": [], "update": []}
        for step, (before, after, expected) in enumerate(
            zip(params, params[1:], losses, strict=False)
        ):
            network.copy_from(before)
            batch = made.source.batch(step)
            pairs = zip(network.step(batch.inputs, batch.context["label"]), expected, strict=True)
            found["losses"].append(max(abs(float(own) / other - 1) for own, other in pairs))
            found["update"].append(max(network.distances(before, after)))
        return found

    def near(found: dict[str, Any]) -> bool:
        return max(found["update"]) < UPDATE and max(found["losses"]) < LOSS

    found, broken = apart(), apart(momentum=0.0)
    if not near(found):
        raise SystemExit(f"{way}: the two sides do not compute the same: {found}")
    if near(broken):
        raise SystemExit(f"{way}: the check does not notice that momentum is missing: {broken}")
    return found


def started(way: Way, args: argparse.Namespace) -> Variant:
    """What the process of a way runs."""
    if way.library == "JAX":
        return training(experiment(way, args), warm_up=1)
    import torch

    torch.set_num_threads(CORES[way.cores])
    return torch_training(experiment(way, args), args.memory_format)


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
        help="PyTorch's",
    )
    flags.add_argument("--repeats", type=int, default=9)
    flags.add_argument("--seconds", type=float, default=5.0, help="least length of a repeat")
    flags.add_argument(
        "--least_steps",
        type=int,
        default=20,
        help="on two cores, where the pipe is filled and drained each repeat",
    )
    flags.add_argument(
        "--first_core",
        type=int,
        default=min(system.usable_cpus() or [0]),
        help="which one the ways on one core have",
    )
    flags.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = flags.parse_args()
    ways = {
        str(way): way
        for way in (
            Way(w, c, lib) for w in args.widths for c in args.cores for lib in ("JAX", "PyTorch")
        )
    }
    jax.config.update("jax_num_cpu_devices", max(CORES[way.cores] for way in ways.values()))
    if args.serve:
        way = ways[args.serve]
        jax.config.update("jax_num_cpu_devices", CORES[way.cores])
        return serve(started(way, args))

    measured = {
        k: v for k, v in vars(args).items() if k not in ("write", "serve", "widths", "cores")
    }
    before = Path(__file__).with_name("result.json")
    kept = json.loads(before.read_text())["comparisons"] if before.exists() else {}
    found: dict[str, Any] = {}
    for width in args.widths:
        for cores in args.cores:
            pair = {lib: Way(width, cores, lib) for lib in ("JAX", "PyTorch")}
            agreement = check(pair["JAX"], args)
            print(f"width {width}, {cores}: both sides compute the same, {agreement}", flush=True)
            found[f"width {width}, {cores}"] = {
                "settings": measured,
                "agreement": agreement,
            } | compared(pair, args)
            # Those that were not measured again stay, and a run that is cut short leaves what it has.
            harness.finish(__file__, {"comparisons": kept | found}, args.write)
    rows = [
        [
            name,
            *(
                harness.shown(of_name[side])
                for side in ("JAX", "PyTorch", "ratio", "ratio_without_filling")
            ),
        ]
        for name, of_name in found.items()
    ]
    harness.table(
        [
            "",
            "JAX, images/s",
            "PyTorch, images/s",
            "JAX over PyTorch",
            "filling and draining left out",
        ],
        rows,
    )
    return None


def compared(pair: dict[str, Way], args: argparse.Namespace) -> dict[str, Any]:
    """The two sides in turns, each in a process bound to its cores."""
    count = CORES[pair["JAX"].cores]
    cores = (
        [args.first_core] if count == 1 else (system.usable_cpus() or list(range(count)))[:count]
    )
    with contextlib.ExitStack() as stack:
        variants: dict[str, Variant] = {}
        for library, way in pair.items():
            process = Process(str(way), cores, WARM_UP)
            stack.callback(process.close)
            variants[library] = process
        fastest = max(variant(WARM_UP).images_per_second for variant in variants.values())
        steps = max(
            args.least_steps if count > 1 else 1, round(args.seconds * fastest / args.batch_size)
        )
        timings = list(in_turns(variants, dict.fromkeys(variants, steps), args.repeats))[-1]
    speed = {library: [t.images_per_second for t in found] for library, found in timings.items()}
    ratios = harness.ratios(speed["JAX"], speed["PyTorch"])
    ticks = steps + count - 1  # a pipeline of two takes one tick more than it trains batches
    return {
        "steps": steps,
        **{library: harness.quartiles(found, 1) for library, found in speed.items()},
        "cores": {
            library: harness.quartiles([t.cores for t in found])
            for library, found in timings.items()
        },
        "ratio": harness.quartiles(ratios),
        "ratio_without_filling": harness.quartiles([r * ticks / steps for r in ratios]),
    } | ({"pass": PASS} if count > 1 else {})


if __name__ == "__main__":
    main()
