"""Checkpoints through Orbax: asynchronous, one item a module, restorable onto any device layout. Only this file names Orbax."""

import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dgl_jax import system
from dgl_jax.core.module import ModuleState
from dgl_jax.engines import EngineState
from dgl_jax.engines.placement import Placement
from dgl_jax.errors import UserError, explain, is_disk_full, of_a_path

_LOG = logging.getLogger(__name__)

_POLICIES = ocp.training.preservation_policies

# Small arrays are written by one device: to cut them over all that hold them takes longer than to copy them.
_ARRAYS = ocp.options.ArrayOptions(
    saving=ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=2**20)
)
# Orbax looks for its own files with patterns: a path that is itself one finds nothing, or another folder's files.
_PATTERN = "[]*?\\"
_REFUSED = re.compile("Permission denied|PERMISSION_DENIED|Read-only file system|Not a directory")
_RETRIES = 50  # of reading checkpoints that a training replaces meanwhile


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
        """Opens the folder.

        Args:
          directory: made if missing, unless `read_only`.
          keep: how many of the newest are kept.
          read_only: nothing is written; a training may be at work there.

        Raises:
          UserError: the folder cannot be one, or cannot be written.
        """
        check_path(Path(directory))
        self.directory = Path(directory).absolute()
        self._pending: Any = None
        self._readable = False  # whether this process has read a checkpoint from here
        self._manager: Any = None
        if not read_only:
            with _write_errors(self.directory):
                self._clear_strays()
                self._manager = ocp.training.Checkpointer(
                    self.directory,
                    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                    preservation_policy=_POLICIES.AnyPreservationPolicy(
                        [
                            _POLICIES.LatestN(keep),
                            _POLICIES.BestN(
                                get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
                            ),
                        ]
                    ),
                    cleanup_tmp_directories=True,
                )

    def steps(self) -> list[int]:
        """Steps of all checkpoints that are there now, ascending."""
        return checkpoint_steps(self.directory)

    def save(
        self,
        step: int,
        state: EngineState,
        meta: dict[str, Any],
        accuracy: float | None = None,
        flight: Any = None,
    ) -> None:
        """Begins to write a checkpoint and returns once the arrays are copied; `finish` or the next save waits for the rest.

        Args:
          meta: JSON values that come back with `restore`.
          accuracy: of the last module on validation, decides which checkpoint is the best.
          flight: a snapshot of what is under way, host arrays.

        The first one is read back before this returns.

        Raises:
          UserError: the disk is full, the folder cannot be written, or what was written cannot be read.
        """
        self.finish()
        items: dict[str, Any] = {f"module_{k}": module for k, module in enumerate(state.modules)}
        if flight is not None:
            items["flight"] = flight
        checksums = {name: _checksum(item) for name, item in items.items()}
        text = json.dumps(meta | {"checksums": checksums, "accuracy": accuracy})
        metrics = None if accuracy is None else {"accuracy": accuracy}
        with _write_errors(self.directory), ocp.Context(array_options=_ARRAYS):
            self._pending = self._manager.save_checkpointables_async(
                step,
                items,
                metrics=metrics,
                force=True,
                overwrite=any(kept.step == step for kept in self._manager.checkpoints),
                custom_metadata={"meta": text, "checksum": zlib.crc32(text.encode())},
            )
        if not self._readable:
            self.finish()
            self._read_back(step, state)

    def finish(self) -> None:
        """Waits until the last save is on disk."""
        pending, self._pending = self._pending, None
        if pending:
            with _write_errors(self.directory):
                pending.result()

    def close(self) -> None:
        """Finishes and frees what Orbax holds."""
        try:
            self.finish()
        finally:
            try:
                if self._manager:
                    self._manager.close()
            except (
                Exception
            ) as error:  # the same failure again, which `finish` or `save` has told already
                _LOG.debug("closing the checkpoints: %s", error)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what `save` was given as `meta`.

        Raises:
          ValueError: it is not what was written.
        """
        custom = ocp.checkpointables_metadata(self.directory / str(step)).custom_metadata
        text = custom["meta"]
        # Older checkpoints hold nothing but the text.
        if custom.keys() != {"meta"} and custom.get("checksum") != zlib.crc32(text.encode()):
            raise ValueError("its metadata do not have the checksum they were saved with")
        return json.loads(text)

    def select(self, which: str) -> list[int]:
        """Lists the steps to try, best choice first: 'newest' (then older ones), 'best' on validation, or a step number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory}: holds no checkpoint yet")
        if which == "newest":
            return steps[::-1]
        if which == "best":
            before: list[int] = []
            while steps != before:  # a training may have replaced some while others were looked at
                scored = [
                    (accuracy, step)
                    for step in steps
                    if (accuracy := self._accuracy_of(step)) is not None
                ]
                before, steps = steps, self.steps()
            if not scored:
                raise UserError(
                    f"{self.directory}: no checkpoint has a validation accuracy; use --checkpoint=newest or a step"
                )
            return [max(scored)[1]]
        if which.isdecimal() and int(which) in steps:
            return [int(which)]
        raise UserError(
            f"--checkpoint={which}: there are: newest, best, {', '.join(map(str, steps))}"
        )

    def restore_module(self, k: int, prepare: Prepare) -> ModuleState:
        """Reads one module of the newest whole checkpoint onto its devices; `restore` says what is raised."""
        return self.restore(prepare, only=k).state.modules[0]

    def restore(
        self,
        prepare: Prepare,
        which: str = "newest",
        set_aside: bool = False,
        only: int | None = None,
    ) -> Restored:
        """Reads a checkpoint onto devices, whatever layout it was written from.

        One that a training has removed meanwhile gives way to the newest there is. A damaged one is reported and the one before
        it is taken; `set_aside` then moves it out of the folder, to `damaged/`. If none is whole nothing is moved.

        Args:
          prepare: of the `meta` found, shapes and dtypes of the modules' states (as `jax.eval_shape` of their init gives them) and
            where they are to be.
          only: the one module to read, without what is under way; all by default.

        Raises:
          UserError: there is none, or all are damaged.
        """
        failed: dict[int, str] = {}
        while True:
            there = self.select(
                which
            )  # anew each time: a training may have replaced what could not be read
            if sum(step not in there for step in failed) > _RETRIES:
                raise UserError(
                    f"{self.directory}: a training there replaces checkpoints faster than they can be read; "
                    "try again, or let it keep more of them (config.checkpoint.keep)"
                )
            step = next((step for step in there if step not in failed), None)
            if step is None:
                names = (
                    f"every checkpoint ({', '.join(map(str, there))}) is"
                    if len(there) > 1
                    else f"checkpoint {there[0]} is"
                )
                self._report({step: failed[step] for step in there})
                raise UserError(
                    f"{self.directory}: {names} damaged; restore the files, or begin anew in another --workdir"
                )
            try:
                found = self._load(step, prepare, only)
            except (
                Exception
            ) as error:  # Orbax and its storage layer raise many kinds for a damaged file
                if _not_the_file(error):
                    raise
                failed[step] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                continue
            self._readable = True
            # Older ones that failed were on their way out.
            damaged = {
                other: reason for other, reason in failed.items() if other > step and other in there
            }
            if damaged:
                self._report(damaged)
                _LOG.warning("falling back to checkpoint %d", step)
            for other in damaged if set_aside else ():
                self._set_aside(other)
            return found

    def _report(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            _LOG.warning("checkpoint %d is damaged (%s)", step, reason)

    def _load(self, step: int, prepare: Prepare, only: int | None) -> Restored:
        meta = self.meta(step)
        abstract, placement = prepare(meta)
        wanted: dict[str, Any] = {
            f"module_{k}": jax.tree.map(
                lambda leaf, k=k: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=placement.replicated(k)
                ),
                module,
            )
            for k, module in enumerate(abstract)
            if only in (None, k)
        }
        found = self._read(step, meta, wanted, flight=only is None)
        modules = tuple(found[name] for name in wanted)
        return Restored(step, EngineState(modules), meta, found.get("flight"))

    def _read(
        self, step: int, meta: dict[str, Any], wanted: dict[str, Any], flight: bool = True
    ) -> dict[str, Any]:
        """The items `wanted`, and the flight if there is one, with the checksums they were saved with."""
        if flight and "flight" in meta["checksums"]:
            wanted = wanted | {"flight": None}
        found = ocp.load_checkpointables(self.directory / str(step), wanted)
        for name in wanted:
            if _checksum(found[name]) != meta["checksums"][name]:
                raise ValueError(
                    f"the arrays of {name} do not have the checksum they were saved with"
                )
        return found

    def _read_back(self, step: int, state: EngineState) -> None:
        """Reads what was just written: a disk, or a path, that gives nothing back is found before the run has taken its time."""
        device = system.host_device()  # the devices may be full
        host = None if device is None else jax.sharding.SingleDeviceSharding(device)

        def of(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host or leaf.sharding)

        try:
            self._read(
                step,
                self.meta(step),
                {f"module_{k}": jax.tree.map(of, m) for k, m in enumerate(state.modules)},
            )
        except Exception as error:
            if _not_the_file(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{self.directory}: checkpoint {step} was written there and cannot be read back ({reason}); "
                "use a --workdir on another disk"
            ) from error
        self._readable = True

    def _accuracy_of(self, step: int) -> float | None:
        """On validation, if this checkpoint was evaluated and can be read."""
        try:
            meta = self.meta(step)
            if "accuracy" in meta:
                return meta["accuracy"]
            # Older ones have it where Orbax keeps it.
            return json.loads(
                (self.directory / str(step) / "metrics" / "metrics").read_text("utf-8")
            )["accuracy"]
        except Exception as error:  # removed meanwhile, or damaged, which is told when it is read
            _LOG.debug("checkpoint %d: %s", step, error)
            return None

    def _set_aside(self, step: int) -> None:
        _move(self.directory / str(step), self.directory.parent / "damaged" / str(step))
        self._manager.reload()

    def _clear_strays(self) -> None:
        """Moves away what has a checkpoint's name and is none: Orbax would count it, and not write over it."""
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
            if path.name.isdecimal() and not is_checkpoint(path):
                _LOG.warning(
                    "%s is no checkpoint: moved to %s", path, self.directory.parent / "damaged"
                )
                _move(path, self.directory.parent / "damaged" / path.name)


def check_path(directory: Path, flag: str = "") -> None:
    """Checks that checkpoints in this folder could be read back.

    Args:
      directory: the folder, or the workdir above it.
      flag: what the user calls it, such as `--workdir`.

    Raises:
      UserError: its absolute path has a character that Orbax cannot read behind, or it is a file.
    """
    path = directory.absolute()
    text, name = str(path), f"{flag}={directory}" if flag else str(path)
    wrong = next((c for c in text if c in _PATTERN), "gs:/" if "gs:/" in text else "")
    if any("\ud800" <= c <= "\udfff" for c in text):
        wrong = "bytes that are not UTF-8"
    if wrong:
        name += "" if directory.is_absolute() else f" (that is {text})"
        raise UserError(
            f"{name}: checkpoints under a path with {wrong} cannot be read back; "
            "use a path without it (a symbolic link to this folder would do)"
        )
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{name}: is a file, and must be a folder; move it away, or use another --workdir"
        )


def is_checkpoint(path: Path) -> bool:
    """Tells whether a path in the folder of checkpoints is one, whole or damaged: a folder named by its step, not empty."""
    try:
        return path.name.isdecimal() and str(int(path.name)) == path.name and any(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def checkpoint_steps(directory: Path) -> list[int]:
    """Lists the steps of the checkpoints in a folder, ascending."""
    try:
        return sorted(int(path.name) for path in directory.iterdir() if is_checkpoint(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def newest_meta(directory: Path) -> dict[str, Any]:
    """Returns what `save` was given as `meta` for the newest checkpoint in which it can be read; {} if there is none."""
    checkpoints = Checkpoints(directory, read_only=True)
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.meta(step)
        except Exception as error:  # `restore`, which comes later, tells of the damage
            _LOG.debug("checkpoint %d: %s", step, error)
    return {}


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
        value = zlib.crc32(
            np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data, value
        )
    return value


def _accuracy(metrics: Any) -> float:
    return metrics["accuracy"]


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    path.rename(target)


@contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    """Turns a full disk, or a folder that cannot be written, into one clear line, whatever the storage layer raises for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"{directory}: the disk is full; free some space and run the same line again"
            ) from error
        found = _REFUSED.search(str(error))
        reason = (
            error.strerror
            if isinstance(error, OSError) and of_a_path(error)
            else found and found[0]
        )
        if reason:
            raise UserError(f"{directory}: cannot write there ({reason})") from error
        raise


def _not_the_file(error: BaseException) -> bool:
    """Whether reading failed for a reason that leaves the checkpoint whole."""
    return isinstance(error, PermissionError) or (
        not isinstance(error, OSError) and explain(error) is not None
    )
