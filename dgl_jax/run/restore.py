"""Reads a run back from its workdir: for evaluation, prediction and export, and for its weights."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax.config import Settings
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState
from dgl_jax.data.info import DatasetInfo, listed
from dgl_jax.engines.base import EngineState
from dgl_jax.engines.placement import Placement, one_group
from dgl_jax.errors import UserError
from dgl_jax.run.build import Experiment, make_spec
from dgl_jax.run.checkpoint import Checkpoints, Restored, check_path
from dgl_jax.run.workdir import load_settings
from dgl_jax.spec import TrainSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A run read back from its workdir, on one group of all devices."""

    settings: Settings
    info: DatasetInfo
    spec: TrainSpec
    placement: Placement
    restored: Restored


def read_settings(workdir: Path, flag: str = "--workdir") -> Settings:
    """The configuration that a workdir was made with.

    Raises:
      UserError: it holds no run, or its config.json is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(
            f"{flag}={workdir}: holds no run (no config.json); train one with --mode=train"
        )
    return load_settings(path)


def load_trained(
    workdir: Path,
    which: str = "newest",
    devices: Sequence[jax.Device] | None = None,
    flag: str = "--workdir",
) -> Trained:
    """Restores a run's networks for evaluation, prediction or export; needs no data set.

    Args:
      which: newest, best (on validation) or a step.
      flag: what the user calls this folder.

    Raises:
      UserError: the workdir holds no run, or no such checkpoint.
    """
    check_path(Path(workdir), flag)
    settings = read_settings(workdir, flag)
    directory = Path(workdir) / "checkpoints"
    if not directory.exists():
        raise UserError(f"{flag}={workdir}: holds no checkpoint yet")
    made: dict[str, Any] = {}

    def prepare(meta: dict[str, Any]) -> tuple[Sequence[ModuleState], Placement]:
        info = DatasetInfo.from_dict(meta["dataset"])
        spec = make_spec(settings, info, meta["first_blocks"])
        placement = one_group((devices or jax.devices())[:1], len(spec.modules))
        made.update(info=info, spec=spec, placement=placement)
        return spec.abstract_states(), placement

    checkpoints = Checkpoints(directory, read_only=True)
    try:
        restored = checkpoints.restore(prepare, which)
    finally:
        checkpoints.close()
    return Trained(settings=settings, restored=restored, **made)


def check_weights(experiment: Experiment, other: Trained) -> None:
    """Checks that another run's weights fit this one's modules.

    Raises:
      UserError: they do not; says what differs.
    """
    mine, theirs = experiment.info, other.info
    if len(mine.class_names) != len(theirs.class_names):
        there, here = listed(theirs.class_names, mine.class_names)
        raise UserError(
            f"--init_from: that run knows {there} of data.name={theirs.name}, this one {here} of data.name={mine.name}; "
            "their heads have other shapes: weights can be taken only from a run with as many classes"
        )
    modules = experiment.spec.abstract_states()
    if len(modules) != len(other.spec.modules):
        raise UserError(
            f"--init_from: that run has {len(other.spec.modules)} modules, this one {len(modules)}"
        )
    for k, (own, borrowed) in enumerate(zip(modules, other.restored.state.modules)):
        wanted, given = (own.params, own.batch_stats), ema.evaluated(borrowed)
        if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, given):
            told = [
                f"config.model.{name} is {was} there and {now} here"
                for name, was in dataclasses.asdict(other.settings.model).items()
                if was != (now := getattr(experiment.settings.model, name))
            ]
            if mine.shape != theirs.shape:
                told.append(f"examples are {theirs.shape} there and {mine.shape} here")
            why = "; ".join(told) or "the modules begin at other blocks"
            raise UserError(
                f"--init_from: module_{k} of that run has parameters of other shapes: {why}"
            )
    if mine.class_names != theirs.class_names:
        there, here = listed(theirs.class_names, mine.class_names)
        _LOG.warning(
            "--init_from: that run knows %s, this one %s: the heads begin with weights of other classes",
            there,
            here,
        )


def borrow_weights(spec: TrainSpec, state: EngineState, other: Trained) -> EngineState:
    """Gives another run's parameters and batch statistics, as it is evaluated, a fresh optimizer state and count."""
    modules = []
    for mine, theirs in zip(state.modules, other.restored.state.modules, strict=True):
        # Through the host: the two runs may use different devices.
        params, batch_stats = jax.device_get(ema.evaluated(theirs))
        modules.append(dataclasses.replace(mine, params=params, batch_stats=batch_stats))
    # What modules know of each other begins with these weights too.
    for k, module in enumerate(modules):
        modules[k] = dataclasses.replace(
            module, extras=module.extras | spec.method.extras(spec, k, modules)
        )
    return EngineState(tuple(modules), state.flight)
