"""Waits of group c: until the first step of a run, and for the plan of a deep network.

Both are commands in processes of their own, beside which this process stays on the CPU.
"""

import re
import time
from functools import partial

from benchmarks.accelerator.common import Fields, finish, launching, start
from benchmarks.accelerator.rows import Figures, Job, Row, Size, Skipped

_FIRST_STEP = re.compile(
    r"first step after ([\d.]+) s: tracing ([\d.]+) s, compiling ([\d.]+) s "
    r"\((\d+) programs, (\d+) from the cache\)"
)
_IMPORTS = re.compile(r"after ([\d.]+) s of imports")
_NAMES = ("first_step_seconds", "tracing_seconds", "compiling_seconds")


def rows(size: Size) -> list[Row]:
    """Returns the rows of group c that measure waits."""
    row = partial(Row, group="c", process="starting", host=True)
    return [
        row("first step, nothing in the cache", measure=partial(_started, ""), cost=60),
        row("first step, programs in the cache", measure=partial(_started, "again"), cost=40),
        row("plan of ResNet-152", measure=_planned, cost=90, rank=size.late + 2),
    ]


def _started(again: str, job: Job) -> Figures:
    """Trains for a few steps; the second run with `again` reads what the first one compiled."""
    size = job.size
    fields: Fields = {
        "data.name": "synthetic",
        "data.batch_size": size.batches[0],
        "data.augment": "crop_flip",
        "model.width": size.width,
        "model.modules": size.modules,
        "model.head": size.head,
        "model.dtype": "bfloat16",
        "train.steps": 20,
    }
    text, seconds = _run(job, f"run{again}", fields)
    match, imports = _FIRST_STEP.search(text), _IMPORTS.search(text)
    if match is None:
        raise Skipped("the log does not say when the first step was made")
    *times, programs, stored = match.groups()
    if again and stored == "0":
        raise Skipped("the run before has left nothing in the cache")
    return {
        **dict(zip(_NAMES, map(float, times), strict=True)),
        "import_seconds": float(imports[1]) if imports else "unknown",
        "programs": int(programs),
        "from_the_cache": int(stored),
        "command_seconds": round(seconds, 1),
    }


def _planned(job: Job) -> Figures:
    size = job.size
    fields: Fields = {
        "data.batch_size": size.deep_batch,
        "data.image_size": size.side,
        "model.width": size.deep_width,
        "model.dtype": "bfloat16",
        "engine.name": "pipeline",
    }
    _, seconds = _run(job, "plan", fields, "--mode=plan", config="imagenet_resnet152")
    return {"command_seconds": round(seconds, 1)}


def _run(
    job: Job, name: str, fields: Fields, *flags: str, config: str = "cifar10"
) -> tuple[str, float]:
    """Runs a command whose programs are stored; returns its output and seconds."""
    folder = job.folder / "starting"
    flags = (f"--compilation_cache={folder}/cache", *flags)
    command = launching(fields, folder / name, *flags, config=config)
    log, begin = folder / f"{name}.log", time.perf_counter()
    finish(start(command, log), log)
    return log.read_text(errors="replace"), time.perf_counter() - begin
