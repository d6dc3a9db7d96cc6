"""Start of a run: fresh modules, weights of another run, or the newest checkpoint of this run."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.config import Settings
from dgl_jax.config.registry import METHODS, SCHEDULES
from dgl_jax.engines import EngineState, counts, world
from dgl_jax.errors import UserError
from dgl_jax.profile.table import module_costs, table
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.restore import Trained, borrow_weights
from dgl_jax.run.summary import versions
from dgl_jax.run.writers import read_jsonl, truncate, write_text

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStart:
    """State from which this process starts or resumes a run.

    Attributes:
      state: states of the modules, on their devices.
      step: step to start from; 0 for a new run.
      meta: metadata of the checkpoint, as `Saver.save` wrote it; {} for a new run.
      flight: True if the checkpoint held the in-flight state (replay rings).
      clock: value of `time.monotonic()` at the start of the run, shifted as if the run had never
        been stopped.
      versions: library versions at the start; the installation may change during a long run.
      cpu_threads: size of XLA's thread pool; None on an accelerator.
    """

    state: EngineState
    step: int
    meta: dict[str, Any]
    flight: bool
    clock: float
    versions: dict[str, str]
    cpu_threads: int | None


def begin(
    experiment: Experiment, workdir: Path, checkpoints: Checkpoints, weights: Trained | None = None
) -> RunStart:
    """Restores the newest checkpoint, if there is one, or initializes a new run.

    Also writes config.json and cuts metrics.jsonl back to the step of the start.

    Args:
      experiment: the run to start.
      workdir: folder of the run, locked by the caller.
      checkpoints: the checkpoints in `workdir`.
      weights: another run, whose weights a new run starts from.

    Returns:
      The state to train from.

    Raises:
      UserError: there are checkpoints, but all of them are damaged, or the run cannot have its new
        length; see `_check_new_length`.
    """
    now = time.monotonic()
    step, flight = 0, False
    meta: dict[str, Any] = {}
    if world.from_first(checkpoints.steps):
        state, step, meta, flight = _restored(experiment, checkpoints)
    else:
        state = experiment.engine.init()
        if weights is not None:
            state = experiment.engine.place(borrow_weights(experiment.spec, state, weights))
    if world.first():
        _tidy(workdir, step, meta.get("records", 0))
        config = json.dumps(experiment.settings.to_dict(), indent=2)
        write_text(workdir / "config.json", f"{config}\n")
    cpu_threads = system.cpu_threads() if jax.default_backend() == "cpu" else None
    _LOG.info(
        "%s%s",
        experiment.engine.placement.describe(),
        f" ({cpu_threads} threads)" if cpu_threads else "",
    )
    before = meta.get("cpu_threads")
    if before and cpu_threads and before != cpu_threads:
        _LOG.warning(
            "%d threads after %d: results are rounded differently than in an uninterrupted run; "
            "NPROC=%d sets the earlier number",
            cpu_threads,
            before,
            before,
        )
    for line in table(module_costs(experiment.spec)):
        _LOG.info("%s", line)
    return RunStart(
        state, step, meta, flight, now - meta.get("wall_seconds", 0.0), versions(), cpu_threads
    )


def _restored(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[EngineState, int, dict[str, Any], bool]:
    """Returns state, step, metadata of the newest intact checkpoint; True if it held a flight."""
    restored = checkpoints.restore(
        lambda _: (experiment.spec.abstract_states(), experiment.engine.placement), set_aside=True
    )
    planned, total = restored.meta["total_steps"], experiment.total_steps
    settings = experiment.settings
    if planned != total:
        _check_new_length(settings, planned, total, counts(restored.state))
    state = experiment.engine.resume(restored.state, restored.flight)
    if state.flight is not None and restored.flight is None:
        _LOG.warning(
            "the checkpoint holds no replay rings: they start empty, and the run will differ from "
            "an uninterrupted one"
        )
    _LOG.info("resuming from step %d", restored.step)
    if SCHEDULES[settings.schedule.name].whole and planned != total:
        _LOG.warning(
            "the cosine schedule now ends at step %d, not %d: the result differs from that of one "
            "uninterrupted run of this length",
            total,
            planned,
        )
    elif planned != total and (reason := _difference(settings, planned, counts(restored.state))):
        _LOG.warning(
            "%s: the result differs from that of one uninterrupted run of %d steps", reason, total
        )
    return state, restored.step, restored.meta, restored.flight is not None


def _difference(settings: Settings, planned: int, made: Sequence[int]) -> str:
    """Returns why a run of a new length differs from one planned so; "" if it does not."""
    kind = METHODS[settings.method.name]
    if kind.in_turn:
        return "the modules train one after the other again"
    if kind.delayed and len(made) > 1 and {*made} == {planned}:
        return f"at step {planned} the gradients in flight were used up"
    return ""


def _check_new_length(settings: Settings, planned: int, total: int, made: Sequence[int]) -> None:
    """Checks that a run can have another length than it was planned with.

    Args:
      settings: configuration of the run.
      planned: number of steps that the run was planned with.
      total: new number of steps.
      made: updates that each module has made.

    Raises:
      UserError: modules have seen more batches than the new length has, or their updates would be
        others in a run of that length.
    """
    kind, name = METHODS[settings.method.name], settings.method.name
    uneven, last = len(set(made)) > 1, len(made) - 1
    # Batches that the first module has run forward. Once it has them all, the counts do not tell.
    ahead = last if kind.unlocked and uneven else 0
    seen = min(max(made) + ahead, planned)
    # Some modules had no further batch, and used up what was in flight.
    usual = [max(made) - last + k for k in range(len(made))]
    ending = kind.delayed and uneven and (max(made) + ahead > planned or [*made] != usual)
    lead = (
        f"config.train: {total} steps, but this run was planned with {planned} and its modules "
        f"have made {', '.join(map(str, made))} updates; "
    )
    if (kind.in_turn and {*made} != {planned}) or (ending and total > planned):
        raise UserError(
            f"{lead}config.method.name={name} must finish with {planned} before it can be extended"
        )
    if total < seen:
        raise UserError(f"{lead}use at least {seen} steps")


def _tidy(workdir: Path, step: int, records: int) -> None:
    """Removes the metrics written after `step` or at the end of the run, and summary.json.

    The resumed run writes all of them again. Metrics that should be there and are not get a
    warning: `records` is how many were written until the checkpoint of `step`.
    """
    metrics = workdir / "metrics.jsonl"
    (workdir / "summary.json").unlink(missing_ok=True)
    again = ("test/", "final/") if step else ("test/", "final/", "diagnostics/")
    truncate(metrics, step, without=again)
    found = len(read_jsonl(metrics)) if metrics.exists() else 0
    if step and found < records:
        _LOG.warning(
            "%s: %d of %d records of the steps up to %d are missing and lost; training continues",
            metrics,
            records - found,
            records,
            step,
        )
