"""Checkpoints through Orbax, restorable onto any device layout. Only this file imports Orbax.

A checkpoint holds one Orbax item per module, named `module_0`, `module_1`, ..., optionally an item
`flight` with the in-flight state of an asynchronous run (replay rings, turns), and JSON metadata
with a checksum of every item.
"""

import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dgl_jax import system
from dgl_jax.core.module import ModuleState
from dgl_jax.engines import EngineState, world
from dgl_jax.engines.placement import Placement
from dgl_jax.errors import UserError
from dgl_jax.run.arrays import OtherShapes, check_shapes, checksum, raw, target, typed
from dgl_jax.run.checkpoint_folder import (
    check_path,
    checkpoint_steps,
    first_line,
    is_checkpoint,
    is_file_intact,
    mend_accuracy,
    move,
    quiet,
    write_errors,
)

_LOG = logging.getLogger(__name__)

_POLICIES = ocp.training.preservation_policies

# One device writes a small replicated array: splitting the write over all its devices is slower.
_SMALL = 2**20  # bytes
OTHER_NETWORK = (
    "{}: holds another network: {}; restore config.json of the run, or the code of its parts"
)
_RETRIES = 50  # attempts to read checkpoints that a running training keeps replacing


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read back.

    Attributes:
      step: step of the checkpoint.
      state: states of the modules, on their devices.
      meta: metadata that was passed to `Checkpoints.save`.
      flight: snapshot of the in-flight state, if the checkpoint holds one.
    """

    step: int
    state: EngineState
    meta: dict[str, Any]
    flight: Any = None


# Maps metadata to the shapes and dtypes of the modules' states, and the devices to load them on.
Prepare = Callable[[dict[str, Any]], tuple[Sequence[ModuleState], Placement]]


class Checkpoints:
    """Folder of checkpoints of a workdir: the newest `keep` ones and the best on validation."""

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False):
        """Opens the folder.

        Args:
          directory: the folder, created if missing unless `read_only`.
          keep: number of newest checkpoints to keep.
          read_only: write nothing, so that the folder of a running training can be read.

        Raises:
          UserError: checkpoints at this path could not be read back, or it cannot be written.
        """
        check_path(Path(directory))
        self.directory = Path(directory).absolute()
        self._pending: Any = None
        self._readable = False  # True once this process has read a checkpoint from this folder
        self._manager: Any = None
        if not read_only:
            with write_errors(self.directory):
                if world.first():
                    self._move_strays()
                    for step in self.steps():
                        mend_accuracy(self.directory / str(step), self._accuracy_of(step)[0])
                world.barrier()
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
        """Lists the steps of all present checkpoints in ascending order."""
        return checkpoint_steps(self.directory)

    def save(
        self,
        step: int,
        state: EngineState,
        meta: dict[str, Any],
        accuracy: float | None = None,
        flight: Any = None,
    ) -> None:
        """Starts to write a checkpoint; returns as soon as the arrays are copied.

        `finish` or the next `save` waits for the write. The first checkpoint of a process is read
        back before this method returns, so that an unusable folder is noticed early.

        Args:
          step: step of the checkpoint; an existing one of the same step is overwritten.
          state: states of the modules, see `arrays.collected`.
          meta: JSON values that `restore` returns.
          accuracy: validation accuracy of the last module, which decides the best checkpoint.
          flight: snapshot of the in-flight state, a pytree of host arrays.

        Raises:
          UserError: the disk is full, the folder cannot be written, or the checkpoint cannot be
            read back.
        """
        self.finish()
        items: dict[str, Any] = {f"module_{k}": raw(m) for k, m in enumerate(state.modules)}
        if flight is not None:
            items["flight"] = flight
        checksums = {name: checksum(item) for name, item in items.items()}
        own = {"step": step, "checksums": checksums, "accuracy": accuracy}
        text = json.dumps(meta | own)
        metrics = None if accuracy is None else {"accuracy": accuracy}
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = _SMALL
        with write_errors(self.directory), context:
            self._pending = self._manager.save_checkpointables_async(
                step,
                items,
                metrics=metrics,
                force=True,
                overwrite=any(existing.step == step for existing in self._manager.checkpoints),
                custom_metadata={"meta": text, "checksum": zlib.crc32(text.encode())},
            )
        if not self._readable:
            self.finish()
            self._read_back(step, state)

    def finish(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: the disk is full, or the folder cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            with write_errors(self.directory):
                pending.result()

    def close(self) -> None:
        """Waits for the last save and releases the resources of Orbax."""
        try:
            self.finish()
        finally:
            try:
                if self._manager:
                    self._manager.close()
            except Exception as error:
                # Repeats a failure that `finish` or `save` has raised already.
                _LOG.debug("closing the checkpoints: %s", error)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the metadata that `save` stored; raises ValueError if their checksum is wrong."""
        return self._described(step)[0]

    def _described(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the metadata, and by item the shapes and dtypes of its arrays."""
        described = ocp.checkpointables_metadata(self.directory / str(step))
        custom = described.custom_metadata
        text = custom["meta"]
        if custom.get("checksum") != zlib.crc32(text.encode()):
            raise ValueError("its metadata do not match their checksum")
        meta = json.loads(text)
        if meta["step"] != step:
            raise ValueError(f"it was written as checkpoint {meta['step']}")
        return meta, described.metadata

    def select(self, which: str) -> list[int]:
        """Lists the steps that satisfy a choice, in the order in which to try them.

        Args:
          which: "newest" (all steps, newest first), "best" (on validation) or a step number.

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
            # A running training may replace checkpoints while their accuracies are read: repeat
            # until the list is stable.
            while steps != before:
                known = {step: self._accuracy_of(step) for step in steps}
                before, steps = steps, self.steps()
            self._report({step: reason for step, (_, reason) in known.items() if reason})
            scored = [(value, step) for step, (value, _) in known.items() if value is not None]
            if not scored:
                raise UserError(
                    f"{self.directory}: no checkpoint has a validation accuracy; "
                    "use --checkpoint=newest or a step"
                )
            return [max(scored)[1]]
        if which.isdecimal() and int(which) in steps:
            return [int(which)]
        raise UserError(
            f"--checkpoint={which}: no such checkpoint; use newest, best, "
            f"{', '.join(map(str, steps))}"
        )

    def restore_module(self, k: int, prepare: Prepare) -> ModuleState:
        """Reads one module of the newest intact checkpoint onto its devices; see `restore`."""
        return self.restore(prepare, only=k).state.modules[0]

    def restore(
        self,
        prepare: Prepare,
        which: str = "newest",
        set_aside: bool = False,
        only: int | None = None,
    ) -> Restored:
        """Reads a checkpoint onto devices, independent of the layout it was written from.

        If a running training removes the checkpoint meanwhile, the newest remaining one is read. A
        damaged checkpoint is reported, and the next older one is read instead.

        Args:
          prepare: maps the stored metadata to the shapes and dtypes of the modules' states, as
            `jax.eval_shape` of their initialization returns them, and to their placement.
          which: "newest", "best" (on validation) or a step number.
          set_aside: move damaged checkpoints to the folder `damaged/` of the workdir; nothing is
            moved if no checkpoint is intact.
          only: index of the single module to read, without the in-flight state; by default all
            modules are read.

        Returns:
          The checkpoint; its state holds one module if `only` is given.

        Raises:
          UserError: there is no such checkpoint, or all candidates are damaged.
        """
        failed: dict[int, str] = {}
        other_network: set[int] = set()  # steps among them
        refused: list[Exception] = []  # by `prepare`: nothing is wrong with the checkpoint

        def prepared(meta: dict[str, Any]) -> tuple[Sequence[ModuleState], Placement]:
            try:
                return prepare(meta)
            except Exception as error:
                refused.append(error)
                raise

        while True:
            # List again on every attempt: a running training may have replaced a checkpoint that
            # could not be read.
            present = world.from_first(lambda: self.select(which))
            if sum(step not in present for step in failed) > _RETRIES:
                raise UserError(
                    f"{self.directory}: a running training replaces checkpoints faster than they "
                    "can be read; try again, or let it keep more of them (config.checkpoint.keep)"
                )
            untried = [step for step in present if step not in failed]
            step = (untried or present)[0]
            if not untried:
                names = (
                    f"every checkpoint ({', '.join(map(str, present))}) is"
                    if len(present) > 1
                    else f"checkpoint {present[0]} is"
                )
                if other_network.issuperset(present):
                    raise UserError(OTHER_NETWORK.format(self.directory / str(step), failed[step]))
                self._report({step: failed[step] for step in present})
                raise UserError(
                    f"{self.directory}: {names} damaged; restore the files, or start again in "
                    "another --workdir"
                )
            restored, reason = None, None
            with quiet():
                try:
                    restored = self._load(step, prepared, only)
                except Exception as error:
                    # Orbax and its storage layer raise many kinds of exceptions for damaged files.
                    if is_file_intact(error) or error in refused:
                        raise
                    reason = first_line(error)
                    other_network |= {step} if isinstance(error, OtherShapes) else set()
            reason = next(filter(None, world.exchange(reason)), None)
            if reason is not None or restored is None:
                failed[step] = reason or ""
                continue
            self._readable = True
            # Older checkpoints that failed were being removed by a running training.
            damaged = {s: reason for s, reason in failed.items() if s > step and s in present}
            if damaged:
                self._report(damaged)
                _LOG.warning("falling back to checkpoint %d", step)
            for other in damaged if set_aside and world.first() else ():
                self._set_aside(other)
            return restored

    def _report(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            _LOG.warning("checkpoint %d is damaged (%s)", step, reason)

    def _load(self, step: int, prepare: Prepare, only: int | None) -> Restored:
        meta, stored = self._described(step)
        abstract, placement = prepare(meta)
        chosen = [k for k in range(len(abstract)) if only in (None, k)]
        for k in chosen:
            check_shapes(f"module_{k}", stored[f"module_{k}"], raw(abstract[k]))
        wanted = {f"module_{k}": target(abstract[k], placement.replicated(k)) for k in chosen}
        items = self._read(step, meta, wanted, flight=only is None)
        modules = tuple(typed(items[f"module_{k}"], abstract[k]) for k in chosen)
        return Restored(step, EngineState(modules), meta, items.get("flight"))

    def _read(
        self, step: int, meta: dict[str, Any], wanted: dict[str, Any], flight: bool = True
    ) -> dict[str, Any]:
        """Reads the `wanted` items, and the flight if there is one, and verifies the checksums."""
        if flight and "flight" in meta["checksums"]:
            wanted = wanted | {"flight": None}
        items = ocp.load_checkpointables(self.directory / str(step), wanted)
        for name in wanted:
            if checksum(items[name]) != meta["checksums"][name]:
                raise ValueError(f"the arrays of {name} do not match their checksum")
        return items

    def _read_back(self, step: int, state: EngineState) -> None:
        """Reads the checkpoint just written, so that an unreadable disk or path fails early."""
        # Read into host memory: the accelerators may have no room for a second copy.
        device = system.host_device()
        host = None if device is None else jax.sharding.SingleDeviceSharding(device)
        wanted = {
            f"module_{k}": jax.tree.map(lambda leaf: target(leaf, host or leaf.sharding), module)
            for k, module in enumerate(state.modules)
        }
        try:
            self._read(step, self.meta(step), wanted)
        except Exception as error:
            if is_file_intact(error):
                raise
            raise UserError(
                f"{self.directory}: checkpoint {step} was written but cannot be read back "
                f"({first_line(error)}); use a --workdir on another disk"
            ) from error
        self._readable = True

    def _accuracy_of(self, step: int) -> tuple[float | None, str]:
        """Returns the validation accuracy of a checkpoint, None if unknown, and its damage."""
        try:
            return self.meta(step)["accuracy"], ""
        except Exception as error:
            # A running training may have removed it meanwhile.
            return None, first_line(error) if step in self.steps() else ""

    def _set_aside(self, step: int) -> None:
        move(self.directory / str(step), self.directory.parent / "damaged" / str(step))
        self._manager.reload()

    def _move_strays(self) -> None:
        """Moves away files and empty folders named like checkpoints, which would confuse Orbax."""
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
            if path.name.isdecimal() and not is_checkpoint(path):
                folder = self.directory.parent / "damaged"
                _LOG.warning("%s is not a checkpoint: moved to %s", path, folder)
                move(path, folder / path.name)


def _accuracy(metrics: Any) -> float:
    return metrics["accuracy"]
