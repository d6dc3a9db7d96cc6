"""Temporary memory of a training step as XLA plans it: local losses and back-propagation.

python benchmarks/memory/run.py [--part cnn6] [--widths 32 128] [--batch_size 128] [--write]
python benchmarks/memory/run.py --part imagenet [--networks resnet152 vgg19]
    [--batch_sizes 16 32] [--write]

Nothing is timed. --write replaces only the measured part of `result.json`.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import imagenet
from measure import Compiled, holdings, measure, pipeline_peak

from dgl_jax.models import cuts
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.types import Batch, Inbox, Message, nbytes

BLOCKS = 6
LIMITS = {2: 0.8, 3: 0.65, 6: 0.45}  # by number of modules: largest ratio to back-propagation


def build(engine: str, modules: int, split: str, args: argparse.Namespace) -> Experiment:
    """Builds the 6-layer CNN on one device."""
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__augment="crop_flip",
        model__name="cnn6",
        model__width=args.width,
        model__modules=modules,
        model__split=split,
        model__head="mlp_sr",
        engine__name="fused" if engine == "backprop" else engine,
        method__name="backprop" if engine == "backprop" else "dgl",
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:1])


def segment(first: int, end: int, args: argparse.Namespace) -> Compiled:
    """Compiles the pipeline's program of the module with blocks `first` to `end` - 1."""
    starts = sorted({0, first, end} - {BLOCKS})
    experiment = build("pipeline", len(starts), ",".join(map(str, starts)), args)
    k, batch, hops = starts.index(first), batch_shapes(experiment), experiment.spec.hops
    incoming = Message(hops[k - 1].payload) if k else batch
    compiled = measure(
        harness.programs(experiment.engine)[k],
        experiment.spec.abstract_states()[k],
        Inbox(incoming),
        batch.context,
    )
    compiled.message = nbytes((hops[k].payload, batch.context)) if k < len(hops) else 0
    return compiled


def batch_shapes(experiment: Experiment) -> Batch:
    """Returns the shapes and dtypes of a batch of the source."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experiment.source.batch(0)
    )


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Compares K = 2, 3, 6 modules with back-propagation at one width and prints the table."""
    experiment = build("backprop", 1, "count", args)
    backprop = measure(
        harness.step(experiment.engine), experiment.spec.abstract_states(), batch_shapes(experiment)
    )
    base = backprop.temporary + backprop.added
    print(
        f"cnn6, width {args.width}, batch {args.batch_size}: "
        f"back-propagation {base / 2**20:.1f} MiB",
        flush=True,
    )
    segments = {ends: segment(*ends, args) for ends in itertools.combinations(range(BLOCKS + 1), 2)}

    def evaluate(starts: tuple[int, ...], held: list[tuple[int, list[int]]]) -> dict[str, Any]:
        programs = [segments[ends] for ends in itertools.pairwise([*starts, BLOCKS])]
        peak = pipeline_peak(programs, held)
        return {
            "split": ",".join(map(str, starts)),
            "bytes": peak,
            "ratio": round(peak / base, 4),
            "temporary_ratios": [round(p.temporary / base, 4) for p in programs],
            "message_bytes": [p.message for p in programs[:-1]],
        }

    rows, results = [], []
    for modules, limit in LIMITS.items():
        experiment = build("fused", modules, "count", args)
        fused = measure(
            harness.step(experiment.engine),
            experiment.spec.abstract_states(),
            batch_shapes(experiment),
        )
        fused_ratio = (fused.temporary + fused.added) / base
        held = holdings(modules)
        splits = [(0, *rest) for rest in itertools.combinations(range(1, BLOCKS), modules - 1)]
        equal = evaluate(cuts("count", BLOCKS, modules), held)
        best = min(
            (evaluate(starts, held) for starts in splits), key=lambda result: result["bytes"]
        )
        results.append(
            {
                "modules": modules,
                "limit": limit,
                "fused_ratio": round(fused_ratio, 4),
                "count": equal,
                "best": best,
            }
        )
        cells = [
            f"{fused_ratio:.3f}",
            f"{max(equal['temporary_ratios']):.3f}",
            f"{equal['ratio']:.4f}",
            limit,
        ]
        rows.append(
            [
                modules,
                *cells,
                "yes" if equal["ratio"] < limit else "NO",
                f"{best['ratio']:.4f} ({best['split']})",
            ]
        )
    harness.table(
        [
            "K",
            "fused",
            "largest program alone",
            "pipeline, split `count`",
            "limit",
            "below limit",
            "pipeline, best split",
        ],
        rows,
    )
    return {
        "width": args.width,
        "batch_size": args.batch_size,
        "backprop_bytes": base,
        "rows": results,
        "segments": {
            f"{first}-{end}": vars(compiled) for (first, end), compiled in segments.items()
        },
    }


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--part", choices=["cnn6", "imagenet"], default="cnn6")
    flags.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    flags.add_argument("--batch_size", type=int, default=128)
    flags.add_argument(
        "--networks", nargs="+", default=list(imagenet.SPLITS), choices=list(imagenet.SPLITS)
    )
    flags.add_argument("--batch_sizes", type=int, nargs=2, default=[16, 32])
    args = flags.parse_args()
    if args.part == "cnn6":
        results = [
            compare(argparse.Namespace(width=width, batch_size=args.batch_size))
            for width in args.widths
        ]
        keep({"environment": harness.environment(), "results": results}, args.write)
    for network in args.networks if args.part == "imagenet" else ():
        keep({network: imagenet.compare(network, tuple(args.batch_sizes))}, args.write)


def keep(part: dict[str, Any], write: bool) -> None:
    """Replaces a part of `result.json` if `write` is set."""
    path = Path(__file__).with_name("result.json")
    if write:
        written = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(written | part, indent=1) + "\n")


if __name__ == "__main__":
    main()
