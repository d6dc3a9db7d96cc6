"""Slowest over mean module time of large networks, cut by count, by FLOPs and by measured time.

python benchmarks/balance/run.py [--networks vgg19 resnet152] [--modules 2 4 8]
    [--image_size 64] [--width 16] [--write]

1 is perfect balance; 1.2 means that the slowest module takes 20 % longer than the mean. Blocks and
heads are measured once and alone, and every cut is rated by their sums. `--programs` also measures
the program of every module.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import optax

from dgl_jax.core.optimizer import make_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.config import Settings
from dgl_jax.models import BlockCosts, cuts
from dgl_jax.profile.flops import block_flops
from dgl_jax.profile.timing import block_times
from dgl_jax.run.build import make_experiment
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.tools.bench import module_times

SPLITS = ("count", "flops", "time")


def settings(network: str, modules: int, split: str, args: argparse.Namespace) -> Settings:
    """Returns the settings of a network on synthetic images."""
    return harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__image_size=args.image_size,
        model__name=network,
        model__width=args.width,
        model__modules=modules,
        model__split=split,
        model__head=args.head,
        engine__name="pipeline",
        train__steps=1,
    )


def over_mean(times: list[float]) -> float:
    """Computes the balance of a cut from the times of its modules; 1 is perfect."""
    return max(times) / statistics.mean(times)


def programs(network: str, starts: tuple[int, ...], args: argparse.Namespace) -> list[float]:
    """Measures the seconds of each module's program when it runs alone."""
    experiment = make_experiment(
        settings(network, len(starts), ",".join(map(str, starts)), args), jax.devices()[:1]
    )
    times = module_times(experiment, experiment.engine.init(), args.calls)
    return [elapsed.seconds for elapsed in times]


def compare(network: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rates all cuts of one network and prints its table."""
    uncut = settings(network, 1, "count", args)
    info = known_info(uncut.data)
    blocks = make_blocks(uncut, info)
    count = len(blocks.blocks)
    optimizer = make_optimizer(uncut.optimizer, optax.constant_schedule(0.0))
    print(
        f"{network}: measuring {count} blocks and their heads, {args.image_size} px, "
        f"{len(info.class_names)} classes, batch {args.batch_size}, width {args.width}",
        flush=True,
    )
    costs = {
        "flops": block_flops(blocks),
        "time": block_times(blocks, optimizer, jax.devices()[0], args.calls).seconds,
    }
    seconds: BlockCosts = costs["time"]
    rows, results = [], []
    for modules in args.modules:
        for split in SPLITS:
            starts = cuts(split, count, modules, lambda split=split: costs[split])
            times = seconds.modules(starts)
            result = {
                "modules": modules,
                "split": split,
                "first_blocks": starts,
                "slowest_over_mean": over_mean(times),
            }
            result["slowest_milliseconds"] = 1e3 * max(times)
            if args.programs:
                program_times = programs(network, starts, args)
                result |= {
                    "programs_slowest_over_mean": over_mean(program_times),
                    "programs_slowest_milliseconds": 1e3 * max(program_times),
                }
            results.append(result)
            cells = [f"{value:.3g}" for name, value in result.items() if "slowest" in name]
            rows.append([modules, split, ",".join(map(str, starts)), *cells])
    header = ["K", "split", "first blocks", "slowest over mean", "slowest, ms"]
    harness.table(
        [*header, *(["programs: slowest over mean", "slowest, ms"] if args.programs else [])], rows
    )
    return {"blocks": count, "cuts": results, "block_seconds": vars(seconds)}


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--networks", nargs="+", default=["vgg19", "resnet152"])
    flags.add_argument("--modules", type=int, nargs="+", default=[2, 4, 8])
    flags.add_argument("--image_size", type=int, default=64)
    flags.add_argument("--batch_size", type=int, default=8)
    flags.add_argument(
        "--width", type=int, default=16, help="channels of the first block; published: 64"
    )
    flags.add_argument("--head", default="mlp_sr")
    flags.add_argument("--calls", type=int, default=7, help="measured calls per block or program")
    flags.add_argument("--programs", action="store_true")
    args = flags.parse_args()
    results = {network: compare(network, args) for network in args.networks}
    chosen = {key: value for key, value in vars(args).items() if key != "write"}
    harness.finish(__file__, {"settings": chosen, "networks": results}, args.write)


if __name__ == "__main__":
    main()
