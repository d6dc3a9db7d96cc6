"""Training entry point for library users and the command line."""

import logging
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgl_jax.config import Settings, make_settings
from dgl_jax.engines import world
from dgl_jax.errors import require
from dgl_jax.run.build import make_experiment, remarks
from dgl_jax.run.compiling import Compiling
from dgl_jax.run.hosts import check_hosts
from dgl_jax.run.loop import train_loop
from dgl_jax.run.restore import check_weights, load_trained, stored_choices
from dgl_jax.run.signals import interrupted_by_signals
from dgl_jax.run.summary import Summary, read_summary
from dgl_jax.run.workdir import check, finished, holds_checkpoint, lock, reporting
from dgl_jax.run.writers import check_writable

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_LOG = logging.getLogger(__name__)


def train_and_evaluate(
    config: "Mapping[str, Any] | ConfigDict | Settings",
    workdir: str | Path,
    init_from: str | Path | None = None,
) -> Summary:
    """Trains the configured run in `workdir`, or resumes the run found there, and tests it.

    A run that has already finished is not trained again: its stored summary is returned.

    Args:
      config: the configuration, see `dgl_jax.config`.
      workdir: folder of the run, created if missing. At the end it holds config.json,
        metrics.jsonl, summary.json, checkpoints/ and plots/.
      init_from: workdir of another run of the same network; a new run starts from its newest
        weights, a resumed run ignores it.

    Returns:
      The content of `summary.json`.

    Raises:
      UserError: the user made a mistake, the run diverged, or memory or disk space ran out.
      Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written first.
    """
    settings = config if isinstance(config, Settings) else make_settings(config)
    workdir = Path(workdir)
    check_hosts(settings)
    # One process looks: another may see the files a moment later.
    world.from_first(lambda: check(workdir, settings))
    if world.from_first(lambda: finished(workdir, settings) is not None):
        _LOG.info("this run is finished, see %s/summary.json", workdir)
        summary = read_summary(workdir)
        assert summary is not None, "it was there a moment ago"
        return summary
    require(
        "--mode=train", "matplotlib"
    )  # plots are drawn at the end; fail before training, not after it
    if settings.log.tensorboard:
        require("config.log.tensorboard=True", "tensorboardX")
    world.from_first(lambda: check_writable(workdir, f"--workdir={workdir}", folder=True))
    with reporting(workdir), closing(Compiling()) as compiling:
        experiment = make_experiment(settings, **stored_choices(workdir, settings))
        for line in remarks(experiment):
            _LOG.warning("%s", line)
        if init_from and world.from_first(lambda: holds_checkpoint(workdir)):
            _LOG.info("--init_from is ignored: this run resumes from its own checkpoint")
            init_from = None
        initial = load_trained(Path(init_from), flag="--init_from") if init_from else None
        if initial:
            check_weights(experiment, initial)
        held = lock(workdir) if world.first() else nullcontext()
        with held, interrupted_by_signals() as interruption:
            world.from_first(lambda: check(workdir, settings))  # another run may have been faster
            return train_loop(experiment, workdir, interruption, compiling, initial)
