"""Restoring of a run from its workdir, for evaluation, prediction, export and `--init_from`."""

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
from dgl_jax.engines import world
from dgl_jax.engines.base import EngineState
from dgl_jax.engines.placement import Placement, one_group
from dgl_jax.errors import UserError
from dgl_jax.models.partition import BALANCED
from dgl_jax.run.build import Experiment, make_spec
from dgl_jax.run.checkpoint import Checkpoints, Restored, check_path
from dgl_jax.run.workdir import holds_checkpoint, load_settings
from dgl_jax.spec import TrainSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained run that was read back from its workdir onto a single device.

    Attributes:
      settings: configuration of the run.
      info: description of its data set.
      spec: device-independent description of the training; its learning rate is 0.
      placement: placement of all modules on that device.
      restored: the checkpoint.
    """

    settings: Settings
    info: DatasetInfo
    spec: TrainSpec
    placement: Placement
    restored: Restored


def read_settings(workdir: Path, flag: str = "--workdir") -> Settings:
    """Reads the configuration of the run in a workdir.

    Args:
      workdir: folder of the run.
      flag: flag that the user gave the folder with, for the message.

    Raises:
      UserError: the folder holds no run, or its config.json is damaged.
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
    """Restores the modules of a run for evaluation, prediction or export, without its data set.

    Args:
      workdir: folder of the run.
      which: "newest", "best" (on validation) or a step.
      devices: the first of these devices is used; by default the first that JAX finds.
      flag: flag that the user gave the folder with, for the messages.

    Raises:
      UserError: the workdir holds no run, or no such checkpoint.
    """
    check_path(Path(workdir), flag)
    settings = read_settings(workdir, flag)
    directory = Path(workdir) / "checkpoints"
    if not directory.exists():
        raise UserError(f"{flag}={workdir}: holds no checkpoint yet")
    built: dict[str, Any] = {}

    def prepare(meta: dict[str, Any]) -> tuple[Sequence[ModuleState], Placement]:
        info = DatasetInfo.from_dict(meta["dataset"])
        spec = make_spec(settings, info, meta["first_blocks"])
        placement = one_group((devices or jax.devices())[:1], len(spec.modules))
        built.update(info=info, spec=spec, placement=placement)
        return spec.abstract_states(), placement

    checkpoints = Checkpoints(directory, read_only=True)
    try:
        restored = checkpoints.restore(prepare, which)
    finally:
        checkpoints.close()
    return Trained(settings=settings, restored=restored, **built)


def check_weights(experiment: Experiment, other: Trained) -> None:
    """Checks that the weights of another run fit the modules of this one.

    Args:
      experiment: this run.
      other: the run that the weights are taken from.

    Raises:
      UserError: they do not fit; the message names the differences.
    """
    mine, theirs = experiment.info, other.info
    if len(mine.class_names) != len(theirs.class_names):
        there, here = listed(theirs.class_names, mine.class_names)
        raise UserError(
            f"--init_from: that run has {there} of data.name={theirs.name}, this one {here} of "
            f"data.name={mine.name}; weights can be taken only from a run with the same number of "
            "classes"
        )
    modules = experiment.spec.abstract_states()
    if len(modules) != len(other.spec.modules):
        raise UserError(
            f"--init_from: that run has {len(other.spec.modules)} modules, this one {len(modules)}"
        )
    for k, (module, source) in enumerate(zip(modules, other.restored.state.modules)):
        wanted, given = (module.params, module.batch_stats), ema.evaluated(source)
        if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, given):
            groups = [
                (group, getattr(other.settings, group), getattr(experiment.settings, group))
                for group in ("model", "method", "objective")
            ]
            reasons = [
                f"config.{group}.{name} is {was} there and {now} here"
                for group, there, here in groups
                for name, was in dataclasses.asdict(there).items()
                if was != (now := getattr(here, name, was))
            ]
            if mine.shape != theirs.shape:
                reasons.append(f"examples are {theirs.shape} there and {mine.shape} here")
            reason = "; ".join(reasons) or "the modules begin at other blocks"
            raise UserError(
                f"--init_from: module_{k} of that run has parameters of other shapes: {reason}"
            )
    if mine.class_names != theirs.class_names:
        there, here = listed(theirs.class_names, mine.class_names)
        _LOG.warning(
            "--init_from: that run has %s, this one %s: "
            "the heads start from weights of other classes",
            there,
            here,
        )


def borrow_weights(spec: TrainSpec, state: EngineState, other: Trained) -> EngineState:
    """Returns a fresh state with the parameters and batch statistics of another run.

    If that run has an EMA of its parameters, the averages are taken. Optimizer states and update
    counts stay fresh.

    Args:
      spec: description of the new run.
      state: fresh state of the new run.
      other: the run that the weights are taken from, see `check_weights`.
    """
    modules = []
    for mine, theirs in zip(state.modules, other.restored.state.modules, strict=True):
        # Through the host: the two runs may use different devices.
        params, batch_stats = jax.device_get(ema.evaluated(theirs))
        module = dataclasses.replace(mine, params=params, batch_stats=batch_stats)
        modules.append(ema.begin(module) if spec.ema else module)
    # Copies of neighboring modules' weights that a method keeps must match the new weights.
    # `jnp.copy`: a method may return an array several times, and engines donate each of them.
    for k, module in enumerate(modules):
        extras = jax.tree.map(jnp.copy, spec.method.extras(spec, k, modules))
        modules[k] = dataclasses.replace(module, extras=module.extras | extras)
    return EngineState(tuple(modules), state.flight)


def stored_choices(workdir: Path, settings: Settings) -> dict[str, Any]:
    """Returns arguments of `make_experiment` that a resumed run takes from its newest checkpoint.

    These are the dataset info and, for measured splits, the cuts: a new measurement could differ.
    """
    meta = world.from_first(
        lambda: newest_meta(workdir / "checkpoints") if holds_checkpoint(workdir) else {}
    )
    stored: dict[str, Any] = (
        {"info": DatasetInfo.from_dict(meta["dataset"])} if "dataset" in meta else {}
    )
    if settings.model.split in BALANCED:
        stored["first_blocks"] = meta.get("first_blocks", ())
    return stored


def newest_meta(directory: Path) -> dict[str, Any]:
    """Returns the metadata of the newest checkpoint with readable metadata; {} if there is none."""
    checkpoints = Checkpoints(directory, read_only=True)
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.meta(step)
        except Exception as error:  # `restore`, which runs later, reports the damage
            _LOG.debug("checkpoint %d: %s", step, error)
    return {}
