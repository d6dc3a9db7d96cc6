"""Begins a run: from fresh modules, from the weights of another run, or from its own newest checkpoint."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.engines import EngineState
from dgl_jax.profile.table import module_costs, table
from dgl_jax.registry import SCHEDULES
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.restore import Trained, borrow_weights
from dgl_jax.run.summary import versions
from dgl_jax.run.writers import read_jsonl, truncate, write_text

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """Where this process takes up a run.

    Attributes:
      state: of the modules, on their devices.
      step: 0 of a new run.
      meta: of the checkpoint it goes on from, as `Saver.save` wrote it; {} of a new run.
      flight: the checkpoint held what was under way.
      clock: `time.monotonic()` when the run began, as if it had never been stopped.
      versions: of the libraries, now and not at the end of a long run.
      cpu_threads: of XLA's pool; None on an accelerator.
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
) -> Begun:
    """Restores the newest checkpoint if there is one; makes config.json and metrics.jsonl agree with where the run begins.

    Args:
      weights: another run's, which a new one starts from.

    Raises:
      UserError: there are checkpoints, and all are damaged.
    """
    now = time.monotonic()
    step, flight = 0, False
    meta: dict[str, Any] = {}
    if checkpoints.steps():
        state, step, meta, flight = _restored(experiment, checkpoints)
    else:
        state = experiment.engine.init()
        if weights is not None:
            state = experiment.engine.place(borrow_weights(experiment.spec, state, weights))
    _tidy(workdir, step, recorded=bool(meta.get("latest")))
    write_text(workdir / "config.json", json.dumps(experiment.settings.to_dict(), indent=2) + "\n")
    cpu_threads = system.cpu_threads() if jax.default_backend() == "cpu" else None
    _LOG.info(
        "%s%s",
        experiment.engine.placement.describe(),
        f" ({cpu_threads} threads)" if cpu_threads else "",
    )
    for line in table(module_costs(experiment.spec)):
        _LOG.info("%s", line)
    return Begun(
        state, step, meta, flight, now - meta.get("wall_seconds", 0.0), versions(), cpu_threads
    )


def _restored(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[EngineState, int, dict[str, Any], bool]:
    """Returns the state of the newest whole checkpoint, its step and meta, and whether it held what was under way."""
    restored = checkpoints.restore(
        lambda _: (experiment.spec.abstract_states(), experiment.engine.placement), set_aside=True
    )
    state = experiment.engine.resume(restored.state, restored.flight)
    if state.flight is not None and restored.flight is None:
        _LOG.warning(
            "the checkpoint holds no replay rings: they are filled anew, and the run is no exact repetition"
        )
    _LOG.info("going on from step %d", restored.step)
    planned = restored.meta["total_steps"]
    if SCHEDULES[experiment.settings.schedule.name].whole and planned != experiment.total_steps:
        _LOG.warning(
            "the cosine now ends at step %d, not %d: this is not what one run of that length would have done",
            experiment.total_steps,
            planned,
        )
    return state, restored.step, restored.meta, restored.flight is not None


def _tidy(workdir: Path, step: int, recorded: bool) -> None:
    """Removes what an earlier part of the run wrote after `step`, and its test, which comes again at the end."""
    metrics = workdir / "metrics.jsonl"
    (workdir / "summary.json").unlink(missing_ok=True)
    truncate(metrics, step, without="test/")
    if recorded and not (metrics.exists() and read_jsonl(metrics)):
        _LOG.warning(
            "%s: holds nothing of the steps up to %d: their curves are lost, training goes on",
            metrics,
            step,
        )
