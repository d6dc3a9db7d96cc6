"""Time of the diagnostics at their default period, as a share of the training time.

python benchmarks/diagnostics/run.py [--write]
"""

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import interleaved

from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.run.probes import Probes

LIMIT = 0.05
CASES: dict[str, dict[str, Any]] = {
    "digits, cnn4, width 32, batch 64": harness.DIGITS,
    "32 x 32 images, cnn6_replay, width 16, batch 128": {
        "data__name": "synthetic",
        "data__image_size": 32,
        "model__name": "cnn6_replay",
        "model__width": 16,
        "model__modules": 6,
        "model__head": "mlp",
    },
}


def build(fields: dict[str, Any]) -> Experiment:
    """Returns an experiment with diagnostics on one device."""
    settings = harness.settings(**fields, train__steps=10**6, diagnostics__enabled=True)
    return make_experiment(settings, jax.devices()[:1])


def measure(experiment: Experiment, repeats: int, steps: int) -> dict[str, Any]:
    """Measures probes and steps in turns.

    Args:
      experiment: the run.
      repeats: number of repeats.
      steps: training steps of a repeat.
    """
    train = interleaved.training(experiment)
    state = experiment.engine.init()
    record: Any = SimpleNamespace(write=lambda step, values: None, extra={})
    step_seconds, probe_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        probes = Probes(experiment, Path(folder), record, 0, {})
        probes.measure(1, state, state)  # compiles
        probes.measure(2, state, state)
        for repeat in range(repeats):
            rate = train(steps).images_per_second
            step_seconds.append(experiment.spec.batch_size / rate)
            begin = time.perf_counter()
            probes.measure(repeat, state, state)
            probe_seconds.append(time.perf_counter() - begin)
    every = experiment.settings.diagnostics.every
    shares = [p / (every * s) for p, s in zip(probe_seconds, step_seconds)]
    return {
        "milliseconds_per_step": harness.quartiles([1e3 * s for s in step_seconds]),
        "milliseconds_per_probe": harness.quartiles([1e3 * s for s in probe_seconds]),
        "every": every,
        "share_of_training": harness.quartiles(shares, 4),
    }


def main() -> None:
    """Measures all cases and prints them; `--write` stores the result beside this file."""
    parser = harness.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    rows = {
        name: measure(build(fields), args.repeats, args.steps) for name, fields in CASES.items()
    }
    for name, row in rows.items():
        print(f"{name}: {harness.shown(row['share_of_training'])} of the training time")
    harness.finish(__file__, {"rows": rows, "limit": LIMIT}, args.write)


if __name__ == "__main__":
    main()
