"""Temporary memory of a training step as XLA's compiler plans it: local losses against back-propagation. No timing.

python benchmarks/memory/run.py [--widths 32 128] [--batch_size 128] [--write]
"""

import argparse
import itertools
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.engines import EngineState, PipelineEngine
from dgl_jax.experiment import Experiment, make_experiment
from dgl_jax.models import cuts
from dgl_jax.packet import Batch, Coded, Targets, nbytes

BLOCKS = 6
LIMITS = {2: 0.8, 3: 0.65, 6: 0.45}


@dataclass
class Compiled:
    """Bytes of one compiled program.

    Attributes:
      temporary: scratch that the program allocates for itself.
      added: outputs that do not lie in a donated argument: the packet for the next module, and the metrics.
      packet: the payload among them.
    """

    temporary: int
    added: int
    packet: int = 0


@dataclass
class Token:
    """Stands for a payload: alive as long as the engine holds it."""

    hop: int
    __hash__ = object.__hash__


@dataclass
class Blank:
    """Stands for a module's state."""

    updates: jax.Array = field(default_factory=lambda: jnp.zeros((), jnp.int32))


jax.tree_util.register_pytree_node(Blank, lambda blank: ((blank.updates,), None), lambda _, leaves: Blank(*leaves))


def experiment(engine: str, modules: int, split: str, args: argparse.Namespace) -> Experiment:
    """The six-layer CNN on one device."""
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__augment="crop_flip",
        model__name="cnn6",
        model__width=args.width,
        model__modules=modules,
        model__split=split,
        model__head="mlp_sr",
        engine__name=engine,
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:1])


def measure(program: Any, *arguments: Any) -> Compiled:
    """Compiles and reads the compiler's plan."""
    plan = program.lower(*arguments).compile().memory_analysis()
    return Compiled(plan.temp_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes)


def segment(first: int, end: int, args: argparse.Namespace) -> Compiled:
    """The pipeline's program of a module that is made of blocks `first` up to, not including, `end`."""
    starts = sorted({0, first, end} - {BLOCKS})
    made = experiment("pipeline", len(starts), ",".join(map(str, starts)), args)
    k, batch, hops = starts.index(first), batch_shapes(made), made.recipe.hops
    incoming = Coded(hops[k - 1].payload) if k else batch
    found = measure(made.engine.programs[k], made.recipe.abstract_states()[k], incoming, batch.targets)
    found.packet = nbytes((hops[k].payload, batch.targets)) if k < len(hops) else 0
    return found


def batch_shapes(made: Experiment) -> Batch:
    """What the source yields, as shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.source.batch(0))


def holdings(modules: int) -> list[tuple[int, list[int]]]:
    """What the pipeline engine on one device holds while each program runs: (module, hops whose packets are alive).

    The engine's own loop runs, on programs that do nothing; garbage collection says which packets it still refers to.
    """
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=1,
        model__name="cnn6",
        model__width=1,
        model__modules=modules,
        engine__name="pipeline",
        train__steps=1,
    )
    made = make_experiment(settings, jax.devices()[:1])
    assert isinstance(made.engine, PipelineEngine)
    alive: weakref.WeakSet[Token] = weakref.WeakSet()
    seen = []

    def program(k: int) -> Any:
        def run(state: Blank, incoming: Any, targets: Targets) -> tuple[Blank, Token, dict]:
            seen.append((k, sorted(token.hop for token in alive)))
            token = Token(k)
            if k + 1 < modules:
                alive.add(token)
            return state, token, {}

        return run

    made.engine.programs = [program(k) for k in range(modules)]
    for _ in made.engine.run(EngineState(tuple(Blank() for _ in range(modules))), made.source, 3 * modules):
        pass
    return seen


def pipeline_peak(programs: list[Compiled], held: list[tuple[int, list[int]]]) -> int:
    """The largest sum of a program's own bytes and of the packets that wait meanwhile, its input included."""
    return max(programs[k].temporary + programs[k].added + sum(programs[hop].packet for hop in hops) for k, hops in held)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every number of K = 2, 3, 6 at one width; prints the table."""
    made = experiment("backprop", 1, "count", args)
    backprop = measure(made.engine.step, made.recipe.abstract_states(), batch_shapes(made))
    base = backprop.temporary + backprop.added
    print(f"cnn6, width {args.width}, batch {args.batch_size}: back-propagation {base / 2**20:.1f} MiB", flush=True)
    segments = {ends: segment(*ends, args) for ends in itertools.combinations(range(BLOCKS + 1), 2)}

    def evaluate(starts: tuple[int, ...], held: list[tuple[int, list[int]]]) -> dict[str, Any]:
        programs = [segments[ends] for ends in itertools.pairwise([*starts, BLOCKS])]
        peak = pipeline_peak(programs, held)
        return {
            "split": ",".join(map(str, starts)),
            "bytes": peak,
            "ratio": round(peak / base, 4),
            "temporary_ratios": [round(p.temporary / base, 4) for p in programs],
            "packet_bytes": [p.packet for p in programs[:-1]],
        }

    rows, results = [], []
    for modules, limit in LIMITS.items():
        made = experiment("fused", modules, "count", args)
        fused = measure(made.engine.step, made.recipe.abstract_states(), batch_shapes(made))
        fused_ratio = (fused.temporary + fused.added) / base
        held = holdings(modules)
        splits = [(0, *rest) for rest in itertools.combinations(range(1, BLOCKS), modules - 1)]
        equal = evaluate(cuts("count", BLOCKS, modules), held)
        best = min((evaluate(starts, held) for starts in splits), key=lambda found: found["bytes"])
        results.append({"modules": modules, "limit": limit, "fused_ratio": round(fused_ratio, 4), "count": equal, "best": best})
        cells = [f"{fused_ratio:.3f}", f"{max(equal['temporary_ratios']):.3f}", f"{equal['ratio']:.4f}", limit]
        rows.append([modules, *cells, "yes" if equal["ratio"] < limit else "NO", f"{best['ratio']:.4f} ({best['split']})"])
    harness.table(
        ["K", "fused", "largest program alone", "pipeline, split `count`", "limit", "under", "pipeline, best split"], rows
    )
    return {
        "width": args.width,
        "batch_size": args.batch_size,
        "backprop_bytes": base,
        "rows": results,
        "segments": {f"{first}-{end}": vars(found) for (first, end), found in segments.items()},
    }


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    flags.add_argument("--batch_size", type=int, default=128)
    args = flags.parse_args()
    results = [compare(argparse.Namespace(width=width, batch_size=args.batch_size)) for width in args.widths]
    harness.finish(__file__, {"results": results}, args.write)


if __name__ == "__main__":
    main()
