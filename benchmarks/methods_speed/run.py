"""Ticks per second of DGL, methods with delayed gradients, and data-parallel back-propagation.

python benchmarks/methods_speed/run.py --write
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
from interleaved import in_turns, training

from dgl_jax import system
from dgl_jax.config import Settings
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.tools.plan import plan

DELAYED = ("ddg", "features_replay", "fdg")
METHODS = ("dgl", *DELAYED, "backprop")
# First blocks of two and four modules of about equal cost.
SPLITS = {2: "0,3", 4: "0,2,3,4"}


def settings(method: str, modules: int, args: argparse.Namespace) -> Settings:
    """Returns the settings of a method: a pipeline, or data-parallel back-propagation."""
    return harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__augment="crop_flip",
        model__name="cnn6",
        model__width=args.width,
        model__modules=modules,
        model__split=SPLITS[modules],
        method__name=method,
        engine__name="fused" if method == "backprop" else "pipeline",
        train__steps=10_000_000,
    )


def build(method: str, args: argparse.Namespace, devices: int = 2) -> Experiment:
    """Builds the run of a method in two modules on the first `devices` devices."""
    return make_experiment(settings(method, 2, args), jax.devices()[:devices])


def peak_bytes(method: str, args: argparse.Namespace) -> int | None:
    """Returns the peak memory of a process that trains a few steps, in bytes; None if unknown."""
    command = [sys.executable, __file__, f"--peak_of={method}"]
    command += [f"--width={args.width}", f"--batch_size={args.batch_size}"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def predicted(method: str, modules: int, args: argparse.Namespace) -> float | None:
    """Predicts ticks per second with as many devices and processors as modules.

    Returns:
      The median of three plans, each of which measures the blocks; None for data-parallel
      back-propagation, which is no pipeline.
    """
    if method == "backprop":
        return None
    chosen = settings(method, modules, args)
    plans = [plan(chosen, modules, cores=float(modules))[0] for _ in range(3)]
    return round(statistics.median(numbers["ticks_per_second"] for numbers in plans), 2)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--repeats", type=int, default=11)
    flags.add_argument("--seconds", type=float, default=3.0, help="length of a repeat, about")
    flags.add_argument("--peak_of", default="", help=argparse.SUPPRESS)
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    if args.peak_of:
        training(build(args.peak_of, args))(10)
        print(json.dumps(system.process_peak()))
        return
    peaks = {method: peak_bytes(method, args) for method in METHODS}
    runs = {method: build(method, args) for method in METHODS}
    one_device = "backprop, one device"
    variants = {method: training(run) for method, run in runs.items()}
    variants[one_device] = training(build("backprop", args, devices=1))
    steps = {
        name: max(20, round(args.seconds * run(10).images_per_second / args.batch_size))
        for name, run in variants.items()
    }
    *_, timings = in_turns(variants, steps, args.repeats)
    plans = {(m, k): predicted(m, k, args) for m in METHODS for k in SPLITS}
    rates = {
        name: [timing.images_per_second / args.batch_size for timing in rows]
        for name, rows in timings.items()
    }
    rows: dict[str, Any] = {}
    for method in METHODS:
        traffic = runs[method].engine.traffic()
        rows[method] = {
            "ticks_per_second": harness.quartiles(rates[method], 2),
            "over_dgl": harness.quartiles(harness.ratios(rates[method], rates["dgl"])),
            "predicted_ticks_per_second": plans[method, 2],
            "predicted_ticks_per_second_k4": plans[method, 4],
            "bytes_up_per_image": sum(traffic.wire) - sum(traffic.down),
            "bytes_down_per_image": sum(traffic.down),
            "peak_process_bytes": peaks[method],
        }
        if (plan_rate := plans[method, 2]) is not None:
            over = [rate / plan_rate for rate in rates[method]]
            rows[method]["over_prediction"] = harness.quartiles(over)
    chosen = {k: v for k, v in vars(args).items() if k not in ("write", "peak_of")}
    harness.finish(
        __file__,
        {
            "settings": chosen,
            "steps": steps,
            "backprop_one_device": harness.quartiles(rates[one_device], 2),
            "methods": rows,
        },
        args.write,
    )
    harness.table(
        ["method", "ticks/s", "over dgl", "of the plan", "plan, K = 4", "kB up", "kB down", "MB"],
        [
            [
                method,
                harness.shown(row["ticks_per_second"]),
                harness.shown(row["over_dgl"]),
                harness.shown(row["over_prediction"]) if "over_prediction" in row else "",
                row["predicted_ticks_per_second_k4"] or "",
                round(row["bytes_up_per_image"] / 1e3, 1),
                round(row["bytes_down_per_image"] / 1e3, 1),
                round((row["peak_process_bytes"] or 0) / 1e6),
            ]
            for method, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
