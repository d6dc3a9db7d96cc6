"""Group b: interrupted and undisturbed runs, compared bit for bit at their last checkpoints.

The runs are started with `launch.py`; this process stays on the CPU and leaves the accelerator to
them. Nothing is shared between two runs, not even compiled programs.
"""

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks.accelerator.common import Fields, finish, launching, start
from benchmarks.accelerator.rows import Figures, Job, Row, Size, Skipped
from dgl_jax.run.restore import load_trained

# The gradient of max pooling is a scatter. Deterministic operations make it a loop with a pass per
# value, unless another flag parallelizes it.
_SCATTER = "--xla_gpu_enable_scatter_determinism_expander=true"
# Added to XLA_FLAGS, one after the other until two undisturbed runs agree.
FLAGS = (
    "--xla_gpu_autotune_level=0",
    f"--xla_gpu_exclude_nondeterministic_ops=true {_SCATTER}",
    f"--xla_gpu_deterministic_ops=true {_SCATTER}",
)
_UNDISTURBED = "two undisturbed runs"
_RESUMED = "interrupted and resumed"


def rows(size: Size) -> list[Row]:
    """Returns the rows of this group."""
    row = partial(Row, group="b", process="resuming", host=True)
    plain = {"": _UNDISTURBED} | {flag: f"{_UNDISTURBED}, {flag}" for flag in FLAGS}
    return [
        row(plain[""], measure=partial(_undisturbed, ""), cost=60),
        row(_RESUMED, measure=_resumed, cost=60),
        *(row(plain[f], measure=partial(_with_flag, f), cost=20, rank=1) for f in FLAGS),
        row(f"{_RESUMED}, with the flag", measure=_resumed_with_flag, cost=60, rank=1),
    ]


def _fields(size: Size) -> Fields:
    return {
        "data.name": "synthetic",
        "data.batch_size": size.batches[0],
        "data.augment": "crop_flip",
        "model.width": size.width,
        "model.modules": min(3, size.modules),
        "model.head": size.head,
        "model.dtype": "bfloat16",
        "optimizer.learning_rate": 0.01,
        "train.steps": size.steps,
        "checkpoint.every": size.steps,
        "eval.every": size.steps,
        "log.every": max(1, size.steps // 20),
    }


def _trained(job: Job, name: str, flag: str, interrupt: bool = False) -> Path:
    """Trains a run in a process, or with `interrupt` in two, and returns its workdir."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    workdir = job.folder / "resuming" / (re.sub(r"\W+", "_", flag) + name)
    # With a shared cache, the second run would execute the programs of the first one.
    command = launching(_fields(job.size), workdir, "--compilation_cache=off")
    log = workdir.with_suffix(".log")
    if (workdir / "summary.json").exists():
        return workdir
    shutil.rmtree(workdir, ignore_errors=True)  # a row that was stopped may have left a part
    if interrupt:
        child = start(command, log, XLA_FLAGS=flags)
        while child.poll() is None and not _records(workdir):
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        finish(child, log, (0, 128 + signal.SIGTERM))
        if child.returncode == 0:
            raise Skipped("the run ended before the signal arrived")
    finish(start(command, log, XLA_FLAGS=flags), log)
    return workdir


def _records(workdir: Path) -> bool:
    """Returns True if the run has written metrics, and so is in the middle of its training."""
    metrics = workdir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def _compared(one: Path, other: Path) -> Figures:
    """Compares all arrays of the last checkpoints of two runs."""
    pairs = list(zip(_arrays(one), _arrays(other), strict=True))
    different = [(a, b) for a, b in pairs if not np.array_equal(a, b)]
    distances = [float(np.abs(a.astype(np.float64) - b).max()) for a, b in different]
    return {
        "equal": not different,
        "max_difference": max(distances, default=0.0),
        "different_arrays": len(different),
        "arrays": len(pairs),
    }


def _arrays(workdir: Path) -> list[np.ndarray]:
    modules = load_trained(workdir).restored.state.modules
    states = [replace(module, rng=jax.random.key_data(module.rng)) for module in modules]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(states)]


def _undisturbed(flag: str, job: Job) -> Figures:
    return _compared(_trained(job, "one", flag), _trained(job, "two", flag))


def _resumed(job: Job, flag: str = "") -> Figures:
    return _compared(_trained(job, "one", flag), _trained(job, "resumed", flag, interrupt=True))


def _with_flag(flag: str, job: Job) -> Figures:
    _check_needed(job)
    if earlier := _agreeing(job):
        raise Skipped(f"not needed: two undisturbed runs agree with {earlier}")
    return _undisturbed(flag, job)


def _check_needed(job: Job) -> None:
    """Raises Skipped if two undisturbed runs agree without any flag.

    If these were not compared, a resumed run that equals an undisturbed one shows it as well.
    """
    compared = job.results.get(_UNDISTURBED) or job.results.get(_RESUMED, {})
    if compared.get("equal"):
        raise Skipped("not needed: runs agree without a flag")


def _agreeing(job: Job) -> str | None:
    """Returns the first flag with which two undisturbed runs agreed."""
    names = {flag: f"{_UNDISTURBED}, {flag}" for flag in FLAGS}
    return next((f for f, name in names.items() if job.results.get(name, {}).get("equal")), None)


def _resumed_with_flag(job: Job) -> Figures:
    _check_needed(job)
    flag = _agreeing(job)
    if flag is None:
        raise Skipped("no flag is known to make two undisturbed runs agree")
    return _resumed(job, flag) | {"flag": flag}
