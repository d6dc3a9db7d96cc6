"""Age of the messages that modules read, and reads per message, by rule, ring size and slowdown.

python benchmarks/replay_age/run.py [--write] [--seeds=5]
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.replay import Ring
from dgl_jax.schedule import drawn
from dgl_jax.types import Header

MODULES, SLOWED, UPDATES = 6, 3, 51 * 390
# (ring size, slowdown of module 3): mean age of the messages that module 3 reads (that all modules
# read if none is slowed), with the released rule and with the rule of the paper. Counted with the
# authors' published code.
PUBLISHED: dict[tuple[int, float], tuple[float, float]] = {
    (50, 1.0): (7.25, 3.2),
    (50, 1 / 0.9): (8.9, 3.05),
    (50, 2.0): (24.7, 1.03),
    (30, 1 / 0.9): (6.3, 2.2),
    (10, 1 / 0.9): (2.8, 1.1),
    (2, 1.0): (0.54, 0.23),
}


def simulate(size: int, slowdown: float, rule: str, seed: int) -> list[Ring]:
    """Simulates the turns of a whole run with messages of one number; returns the rings."""
    example: Any = (
        np.zeros(1, np.int8),
        {"label": np.zeros(1, np.int8), "id": np.zeros(1, np.int8)},
    )
    rings = [Ring(example, size, rule, seed=seed) for _ in range(MODULES - 1)]
    slowdowns = [slowdown if k == SLOWED else 1.0 for k in range(MODULES)]
    module_of, updates, turn = drawn(MODULES, slowdowns, seed), [0] * MODULES, 0
    while min(updates) < UPDATES:
        k, turn = module_of(turn), turn + 1
        if updates[k] >= UPDATES and k == MODULES - 1:
            continue
        if k:
            rings[k - 1].sample()
        updates[k] = min(UPDATES, updates[k] + 1)
        if k < MODULES - 1:
            rings[k].add(example[0], example[1], Header(0, 0))
    return rings


def main() -> None:
    """Simulates all cases and prints them; `--write` stores the result beside this file."""
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for (size, slowdown), published in PUBLISHED.items():
        for rule, expected in zip(("released", "least_used_latest"), published):
            runs = [simulate(size, slowdown, rule, seed) for seed in range(args.seeds)]
            # Without a slowed module all rings behave the same, so their mean is used.
            ages = [
                statistics.mean(r.tally.mean_age() for r in rings)
                if slowdown == 1
                else rings[SLOWED - 1].tally.mean_age()
                for rings in runs
            ]
            age = statistics.mean(ages)
            near = abs(age - expected) <= max(0.15, 0.1 * expected)
            tallies = [rings[SLOWED - 1].tally for rings in runs]
            unused = statistics.mean(t.never_used / t.written for t in tallies)
            row = {
                "size": size,
                "slowdown": round(slowdown, 3),
                "rule": rule,
                "age": round(age, 3),
                "published_age": expected,
                "within": near,
                "never_used_share": round(unused, 3),
                "reads_per_message": round(statistics.mean(t.reuse() for t in tallies), 3),
            }
            rows.append(row)
            print(row, flush=True)
    harness.finish(__file__, {"seeds": args.seeds, "updates": UPDATES, "rows": rows}, args.write)


if __name__ == "__main__":
    main()
