"""Test accuracy of decoupled training and back-propagation with equal network, data and budget.

python benchmarks/cifar10_accuracy/run.py --data_dir=PATH [--epochs=16]
    [--workdir=runs/cifar10_accuracy]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dgl_jax.configs import cifar10  # noqa: E402
from dgl_jax.run import plots  # noqa: E402
from dgl_jax.train import train_and_evaluate  # noqa: E402

ENGINES = ("fused", "backprop")


def main() -> None:
    """Trains (or resumes) both runs, then writes curves, summaries and picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="a prepared TFDS directory")
    parser.add_argument("--epochs", type=float, default=16.0)
    parser.add_argument("--workdir", default="runs/cifar10_accuracy")
    args = parser.parse_args()
    here, results, runs = Path(__file__).parent, {}, {}
    for engine in ENGINES:
        config = cifar10.get_config()
        config.data.dir = args.data_dir
        config.model.width = 32
        config.method.name = "backprop" if engine == "backprop" else "dgl"
        config.schedule.name = "cosine"
        config.train.epochs = args.epochs
        workdir = Path(args.workdir) / engine
        train_and_evaluate(config, workdir)
        results[engine] = json.loads((workdir / "summary.json").read_text())
        runs[engine] = workdir
        shutil.copy(workdir / "metrics.jsonl", here / f"{engine}.jsonl")
    (here / "result.json").write_text(json.dumps(results, indent=1) + "\n")
    plots.compare(runs, here / "accuracy.png", "6-layer CNN, width 32, CIFAR-10 (JPEG)")


if __name__ == "__main__":
    main()
