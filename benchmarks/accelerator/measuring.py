"""Timing of training variants in one process, in turns with a baseline."""

import gc
import math
from contextlib import closing
from typing import Any

import jax

from benchmarks import harness
from benchmarks.accelerator import images
from benchmarks.accelerator.common import Fields, configured, counted
from benchmarks.accelerator.rows import Figures, Job, Size, Skipped
from benchmarks.interleaved import Variant, in_turns, training
from dgl_jax import system
from dgl_jax.engines.dispatches import steps_per_dispatch
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.run.compiling import Compiling

_WARM_UP = 3
# An asynchronous engine waits forever if asked for more updates than a training has, and dispatches
# of many steps end at evaluations and checkpoints. Every number of steps up to 16 divides this one.
_MANY = 720_720_000
ENDLESS = {"train.steps": _MANY, "eval.every": _MANY, "checkpoint.every": _MANY}


def cnn6(size: Size, batch: int, **fields: Any) -> Fields:
    """Returns the fields of the 6-layer CNN on small images, with `engine__name` and so on."""
    changed = images.fields(images.SMALL, size, batch) | {
        "model.name": "cnn6",
        "model.width": size.width,
        "model.modules": size.modules,
        "model.head": size.head,
        "model.dtype": "bfloat16",
        **ENDLESS,
    }
    changed |= {name.replace("__", "."): value for name, value in fields.items()}
    if changed.get("method.name") == "backprop":
        del changed["model.head"]  # only the last module has a head, which the network defines
    return changed


def compare(job: Job, fields: Fields, baseline: Fields) -> Figures:
    """Measures a training run in turns with the baseline, which the process keeps for later rows.

    Args:
      job: the row's job.
      fields: fields of the run.
      baseline: fields of the baseline; if they are equal, the baseline is measured alone.

    Returns:
      Figures with `over_baseline`, the images per second over the baseline's.
    """
    experiment = make_experiment(configured(fields))  # first of all, as it may raise UserError
    key = tuple(baseline.items())
    if key not in job.shared:
        job.shared.clear()  # frees the memory of another baseline
        built = make_experiment(configured(baseline))
        job.shared[key] = training(built, warm_up=_WARM_UP)
    variants = {"baseline": job.shared[key]}
    if fields != baseline:
        variants["this"] = training(experiment, warm_up=_WARM_UP)
    at_once = steps_per_dispatch(experiment.engine)
    return described(experiment) | timed(job.size, variants, experiment.spec.batch_size, at_once)


def described(experiment: Experiment) -> Figures:
    """Returns the figures that name a training run and count its operations."""
    settings, spec = experiment.settings, experiment.spec
    codec: Figures = {}
    if settings.codec.name != "identity":
        traffic = spec.traffic()
        compression = round(sum(traffic.raw) / sum(traffic.wire), 2)
        codec = {"codec": settings.codec.name, "compression": compression}
    return (
        {
            "library": "dgl_jax",
            "network": settings.model.name,
            "method": settings.method.name,
            "engine": settings.engine.name,
            "modules": len(spec.modules),
            "width": settings.model.width,
            "dtype": settings.model.dtype,
            "batch_size": spec.batch_size,
            "steps_per_dispatch": steps_per_dispatch(experiment.engine),
        }
        | codec
        | counted(spec)
    )


def timed(size: Size, variants: dict[str, Variant], batch_size: int, at_once: int = 1) -> Figures:
    """Times variants in turns and returns the figures of the last one.

    Args:
      size: length and number of the repeats.
      variants: "baseline", which may be the only one, and the measured one.
      batch_size: images per step.
      at_once: steps per dispatch of the measured one.
    """
    slowest = min(run(2).images_per_second for run in variants.values())
    steps = max(3, math.ceil(size.seconds * slowest / batch_size))
    steps = math.ceil(steps / at_once) * at_once
    timings = list(in_turns(variants, dict.fromkeys(variants, steps), size.repeats))[-1]
    rates = {name: [t.images_per_second for t in row] for name, row in timings.items()}
    *_, last = rates.values()
    figures = {
        "images_per_second": harness.quartiles(last, 1),
        "tick_milliseconds": harness.quartiles([1e3 * batch_size / r for r in last]),
        "steps": steps,
    }
    if len(rates) > 1:
        figures["over_baseline"] = harness.quartiles(harness.ratios(last, rates["baseline"]))
    return figures


def alone(job: Job, experiment: Experiment) -> Figures:
    """Measures one training run without a baseline."""
    run = training(experiment, warm_up=_WARM_UP)
    return described(experiment) | timed(
        job.size,
        {"baseline": run},
        experiment.spec.batch_size,
        steps_per_dispatch(experiment.engine),
    )


def peak(experiment: Experiment, steps: int = 4) -> Figures:
    """Returns the most bytes that were allocated on the device while a few steps ran.

    The process must not have run anything else. Programs come from the cache of compiled programs,
    because choosing their algorithms allocates memory too.

    Raises:
      Skipped: the device tells its memory, and programs were not in the cache.
    """
    with closing(Compiling()) as compiling:
        run = training(experiment, warm_up=1)
        run(steps)
    gc.collect()
    (most,) = (system.peak_memory(jax.devices()[:1]) or {"": None}).values()
    if most is not None and compiling.missed:
        raise Skipped(f"{compiling.missed} programs were compiled here, which takes memory too")
    return described(experiment) | {"peak_memory_bytes": most or "unknown"}
