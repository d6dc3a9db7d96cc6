"""Cost of a fixed number of threads of XLA's CPU pool, which keeps runs equal to the bit.

python benchmarks/thread_count/run.py [--write]
"""

import sys
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import interleaved

from dgl_jax import system
from dgl_jax.run.build import make_experiment

CASES: dict[str, dict[str, Any]] = {
    "digits, cnn4, width 32, batch 64": harness.DIGITS,
    "32 x 32 images, cnn6, width 32, batch 128": {
        "data__name": "synthetic",
        "data__image_size": 32,
        "model__name": "cnn6",
        "model__width": 32,
        "model__modules": 6,
    },
}
STEPS = (100, 10)  # of a repeat, per case


def variant(case: str) -> interleaved.Variant:
    """Returns the training of a case with `fused` on one device."""
    settings = harness.settings(**CASES[case], train__steps=10**6)
    return interleaved.training(make_experiment(settings, jax.devices()[:1]))


def measure(case: str, steps: int, repeats: int) -> dict[str, Any]:
    """Measures a case with both numbers of threads, in turns."""
    cores = sorted(system.usable_cpus() or {0})
    fixed = interleaved.Process(case, cores, pool=system.pool_threads())
    default = interleaved.Process(case, cores)
    variants = {"fixed": fixed, "default": default}
    for timings in interleaved.in_turns(variants, dict.fromkeys(variants, steps), repeats):
        rates = {name: [t.images_per_second for t in rows] for name, rows in timings.items()}
    fixed.close()
    default.close()
    return {
        "threads": {"fixed": system.pool_threads(), "default": len(cores)},
        "images_per_second": {name: harness.quartiles(rate, 0) for name, rate in rates.items()},
        "fixed_over_default": harness.quartiles(harness.ratios(rates["fixed"], rates["default"])),
    }


def main() -> None:
    """Measures all cases and prints them; `--write` stores the result beside this file."""
    parser = harness.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--serve", help="case of a child process")
    args = parser.parse_args()
    if args.serve:
        interleaved.serve(variant(args.serve))
        return
    rows = {case: measure(case, n, args.repeats) for case, n in zip(CASES, STEPS)}
    for case, row in rows.items():
        print(f"{case}: {harness.shown(row['fixed_over_default'])} of the default's speed")
    harness.finish(__file__, {"rows": rows}, args.write)


if __name__ == "__main__":
    main()
