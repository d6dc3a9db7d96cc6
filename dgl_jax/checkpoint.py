"""Checkpoints through Orbax: asynchronous, one item a module, restorable onto any device layout. Only this file names Orbax."""

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dgl_jax.engines import EngineState
from dgl_jax.errors import UserError, explain, is_disk_full
from dgl_jax.module import ModuleState
from dgl_jax.placement import Placement

_LOG = logging.getLogger(__name__)

_POLICIES = ocp.training.preservation_policies


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: step, state on its devices, and what `save` was given as `meta`."""

    step: int
    state: EngineState
    meta: dict[str, Any]
    flight: Any = None  # snapshot of what was under way, where the checkpoint holds one


# meta -> (shapes and dtypes of the modules' states, where they are to be)
Prepare = Callable[[dict[str, Any]], tuple[Sequence[ModuleState], Placement]]


class Checkpoints:
    """The folder `checkpoints/` of a workdir: the newest `keep` and the best on validation."""

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False):
        self.directory = Path(directory).absolute()
        self._pending: Any = None
        self._manager = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_POLICIES.PreserveAll()
            if read_only
            else _POLICIES.AnyPreservationPolicy(
                [
                    _POLICIES.LatestN(keep),
                    _POLICIES.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            cleanup_tmp_directories=not read_only,
        )

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return [c.step for c in self._manager.checkpoints]

    def save(self, step: int, state: EngineState, meta: dict[str, Any], accuracy: float | None = None, flight: Any = None) -> None:
        """Begins to write a checkpoint and returns once the arrays are copied; `finish` or the next save waits for the rest.

        Args:
          meta: JSON values that come back with `restore`.
          accuracy: of the last module on validation, decides which checkpoint is the best.
          flight: a snapshot of what is under way, host arrays.

        Raises:
          UserError: the disk is full.
        """
        self.finish()
        items: dict[str, Any] = {f"module_{k}": module for k, module in enumerate(state.modules)}
        if flight is not None:
            items["flight"] = flight
        meta = meta | {"checksums": {name: _checksum(item) for name, item in items.items()}}
        metrics = None if accuracy is None else {"accuracy": accuracy}
        with _disk_errors(self.directory):
            self._pending = self._manager.save_checkpointables_async(
                step,
                items,
                metrics=metrics,
                force=True,
                overwrite=step in self.steps(),
                custom_metadata={"meta": json.dumps(meta)},
            )

    def finish(self) -> None:
        """Waits until the last save is on disk."""
        pending, self._pending = self._pending, None
        if pending:
            with _disk_errors(self.directory):
                pending.result()

    def close(self) -> None:
        """Finishes and frees what Orbax holds."""
        try:
            self.finish()
        finally:
            try:
                self._manager.close()
            except Exception as error:  # the same failure again, which `finish` or `save` has told already
                _LOG.debug("closing the checkpoints: %s", error)

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`."""
        return json.loads(self._manager.checkpointables_metadata(step).custom_metadata["meta"])

    def select(self, which: str) -> list[int]:
        """Steps to try, best choice first: 'newest' (then older ones), 'best' on validation, or a step number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory}: holds no checkpoint yet")
        if which == "newest":
            return steps[::-1]
        if which == "best":
            scored = [(c.metrics["accuracy"], c.step) for c in self._manager.checkpoints if c.metrics]
            if not scored:
                raise UserError(f"{self.directory}: no checkpoint has a validation accuracy; use --checkpoint=newest or a step")
            return [max(scored)[1]]
        if which.isdigit() and int(which) in steps:
            return [int(which)]
        raise UserError(f"--checkpoint={which}: there are: newest, best, {', '.join(map(str, steps))}")

    def restore_module(self, k: int, prepare: Prepare) -> ModuleState:
        """Reads one module of the newest whole checkpoint onto its devices; `restore` says what is raised."""
        return self.restore(prepare, only=k).state.modules[0]

    def restore(self, prepare: Prepare, which: str = "newest", set_aside: bool = False, only: int | None = None) -> Restored:
        """Reads a checkpoint onto devices, whatever layout it was written from.

        A damaged one is reported and the one before it is taken; `set_aside` then moves it out of the folder, to `damaged/`. Where
        none is whole nothing is moved.

        Args:
          prepare: of the `meta` found, shapes and dtypes of the modules' states (as `jax.eval_shape` of their init gives them) and
            where they are to be.
          only: the one module to read, without what is under way; all by default.

        Raises:
          UserError: there is none, or all are damaged.
        """
        tried, damaged = self.select(which), []
        for step in tried:
            try:
                found = self._load(step, prepare, only)
            except Exception as error:  # Orbax and its storage layer raise many kinds for a damaged file
                if _not_the_file(error):
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                _LOG.warning("checkpoint %d is damaged (%s)", step, reason[0][:200])
                damaged.append(step)
                continue
            if damaged:
                _LOG.warning("falling back to checkpoint %d", step)
            for other in damaged if set_aside else ():
                self._set_aside(other)
            return found
        which = f"every checkpoint ({', '.join(map(str, tried))}) is" if len(tried) > 1 else f"checkpoint {tried[0]} is"
        raise UserError(f"{self.directory}: {which} damaged; restore the files, or begin anew in another --workdir")

    def _load(self, step: int, prepare: Prepare, only: int | None) -> Restored:
        meta = self.meta(step)
        abstract, placement = prepare(meta)
        wanted: dict[str, Any] = {
            f"module_{k}": jax.tree.map(
                lambda leaf, k=k: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated(k)), module
            )
            for k, module in enumerate(abstract)
            if only in (None, k)
        }
        if only is None and "flight" in meta["checksums"]:
            wanted["flight"] = None
        found = self._manager.load_checkpointables(step, wanted)
        modules = tuple(found[name] for name in wanted if name != "flight")
        for name in wanted:
            if _checksum(found[name]) != meta["checksums"][name]:
                raise ValueError(f"the arrays of {name} do not have the checksum they were saved with")
        return Restored(step, EngineState(modules), meta, found.get("flight"))

    def _set_aside(self, step: int) -> None:
        place = self.directory.parent / "damaged"
        place.mkdir(exist_ok=True)
        target = place / str(step)
        if target.exists():
            shutil.rmtree(target)
        (self.directory / str(step)).rename(target)
        self._manager.reload()


def newest_meta(directory: Path) -> dict[str, Any]:
    """What `save` was given as `meta` for the newest checkpoint in which it can be read; {} where there is none."""
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        for step in reversed(checkpoints.steps()):
            try:
                return checkpoints.meta(step)
            except Exception as error:  # `restore`, which comes later, tells of the damage
                _LOG.debug("checkpoint %d: %s", step, error)
        return {}
    finally:
        checkpoints.close()


def all_finite(state: EngineState) -> list[bool]:
    """For each module whether all its parameters and batch statistics are finite; blocks until they are computed."""
    checks = [_finite((module.params, module.batch_stats)) for module in state.modules]
    return [bool(ok) for ok in jax.device_get(checks)]


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _checksum(tree: Any) -> int:
    value = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data, value)
    return value


def _accuracy(metrics: Any) -> float:
    return metrics["accuracy"]


class _disk_errors:
    """Turns a full disk into one clear line, whatever the storage layer raises for it."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and is_disk_full(error):
            raise UserError(f"{self.directory}: the disk is full; free some space and run the same line again") from error


def _not_the_file(error: BaseException) -> bool:
    """Whether reading failed for a reason that leaves the checkpoint whole."""
    return isinstance(error, PermissionError) or explain(error) is not None
