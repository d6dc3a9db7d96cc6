"""Device groups of the modules."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dgl_jax import system
from dgl_jax.engines.transfer import moves, placed_shapes, put_rows
from dgl_jax.errors import UserError
from dgl_jax.models.partition import balanced
from dgl_jax.types import Batch, Message


@dataclass(frozen=True)
class Placement:
    """Device group of each module, as a mesh with one axis named "batch".

    Attributes:
      groups: mesh of each module; modules that share devices share the mesh.
    """

    groups: tuple[Mesh, ...]

    def replicated(self, module: int) -> NamedSharding:
        """Returns the sharding that puts whole arrays on every device of the module's group."""
        return NamedSharding(self.groups[module], PartitionSpec())

    def split(self, module: int) -> NamedSharding:
        """Returns the sharding that splits the leading (batch) axis over the module's group."""
        return NamedSharding(self.groups[module], PartitionSpec("batch"))

    def message(self, module: int) -> Message:
        """Returns a message's shardings on a module: per-example parts split, others replicated."""
        split, whole = self.split(module), self.replicated(module)
        return Message(split, whole, whole, split, whole)

    def crosses(self, hop: int) -> bool:
        """Returns True if messages from module `hop` to module `hop + 1` change devices."""
        return self.groups[hop] != self.groups[hop + 1]

    def count(self) -> int:
        """Returns the number of distinct devices in use."""
        return len({device for group in self.groups for device in group.devices.flat})

    def sizes(self) -> list[int]:
        """Returns the number of devices of each module."""
        return [group.size for group in self.groups]

    def put_batch(self, batch: Batch, module: int) -> Batch:
        """Moves a host batch to a module: examples are split, the step number is replicated.

        Args:
          batch: the batch; if the module spans several processes, the rows of this one.
          module: index of the module.
        """
        split: Any = self.split(module)
        everywhere: Any = self.replicated(module)
        moved: Batch = put_rows(batch, Batch(split, split, everywhere), len(self.processes(module)))
        return moved

    def processes(self, module: int) -> list[int]:
        """Returns the processes that hold devices of a module, in increasing order."""
        return sorted({device.process_index for device in self.groups[module].devices.flat})

    def mine(self, module: int) -> bool:
        """Returns True if this process holds devices of the module."""
        return jax.process_index() in self.processes(module)

    def neighbors(self, process: int) -> list[int]:
        """Returns the processes whose pace a process follows.

        These are the first processes of the modules next to those whose first process it is. The
        other processes of a module are held by its collectives.
        """
        leaders = [self.processes(k)[0] for k in range(len(self.groups))]
        pairs = itertools.pairwise(leaders)
        return sorted({a if b == process else b for a, b in pairs if process in (a, b)} - {process})

    def check_processes(self) -> None:
        """Checks that arrays can move between the modules of a run of several processes.

        Raises:
          UserError: the devices of a move lie partly in the same process, or differ in number; or a
            process has no module.
        """
        last = len(self.groups) - 1
        # Evaluation gathers all predictions at the last module.
        hops = {*itertools.pairwise(range(last + 1)), *((k, last) for k in range(last))}
        for a, b in sorted(hops):
            how, sizes = moves(self.split(a), self.split(b)), self.sizes()
            processes = f"processes {self.processes(a)} and {self.processes(b)}"
            if how == "mixed":
                raise UserError(
                    f"config.engine.group_sizes: module_{a} and module_{b} lie on {processes}; JAX "
                    "moves arrays either inside one process or between separate ones, so let every "
                    "module have whole processes, or a part of one"
                )
            if how == "cross" and sizes[a] != sizes[b]:
                raise UserError(
                    f"config.engine.group_sizes: module_{a} has {sizes[a]} devices and module_{b} "
                    f"{sizes[b]}, on {processes}; JAX moves arrays between processes only if the "
                    "numbers are equal"
                )
        used = {process for k in range(last + 1) for process in self.processes(k)}
        if idle := sorted(set(range(jax.process_count())) - used):
            raise UserError(
                f"config.engine.group_sizes={tuple(self.sizes())}: processes {idle} have no "
                f"module; start {len(used)} processes, or give the modules more devices"
            )

    def batch_shapes(self, batch: Batch) -> Batch:
        """Returns shapes, dtypes and shardings of a batch on the devices of module 0."""
        split, whole = self.split(0), self.replicated(0)
        return Batch(
            placed_shapes(batch.inputs, split),
            placed_shapes(batch.context, split),
            placed_shapes(batch.step, whole),
        )

    def describe(self) -> str:
        """Returns one line for the log that lists the devices of each module."""
        several = jax.process_count() > 1  # ids then have large gaps
        names = [
            f"process {','.join(map(str, self.processes(k)))} ({group.size} devices)"
            if several
            else ",".join(str(d.id) for d in group.devices.flat)
            for k, group in enumerate(self.groups)
        ]
        kinds = sorted({system.device_kind(d) for group in self.groups for d in group.devices.flat})
        return f"{', '.join(kinds)}: " + "; ".join(
            f"module {k} on {name}" for k, name in enumerate(names)
        )


def one_group(devices: Sequence[jax.Device], modules: int) -> Placement:
    """Places all modules on one group of all the devices."""
    return Placement((_mesh(devices),) * modules)


def assign(
    devices: Sequence[jax.Device],
    modules: int,
    group_sizes: Sequence[int] = (),
    costs: Sequence[float] = (),
) -> Placement:
    """Assigns devices to modules.

    With at least one device per module, each module gets an equal number of consecutive devices and
    the remaining ones stay idle. With fewer, consecutive modules share a device so that the largest
    total cost on one device is minimal.

    Args:
      devices: available devices, in order.
      modules: number of modules K.
      group_sizes: number of devices per module, which overrides the rule above; empty: none.
      costs: relative cost of each module, for modules that share devices; empty: all equal.

    Returns:
      The placement of the modules.

    Raises:
      UserError: `group_sizes` does not have K entries or asks for more devices than there are.
    """
    per_process = max(Counter(device.process_index for device in devices).values())
    groups = layout(len(devices), modules, group_sizes, costs, per_process)
    return Placement(tuple(_mesh([devices[i] for i in group]) for group in groups))


def layout(
    count: int,
    modules: int,
    group_sizes: Sequence[int] = (),
    costs: Sequence[float] = (),
    per_process: int = 0,
) -> list[range]:
    """Returns the device indices of each module, as `assign` chooses them.

    Args:
      count: number of available devices.
      modules: number of modules K.
      group_sizes: number of devices per module; empty: chosen as in `assign`.
      costs: relative cost of each module; empty: all equal.
      per_process: number of devices of each process; 0: all belong to one. A module then gets whole
        processes, or an equal part of one.

    Returns:
      K ranges of indices in [0, count).

    Raises:
      UserError: `group_sizes` does not have K entries or asks for more than `count` devices.
    """
    sizes = list(group_sizes)
    if sizes:
        if len(sizes) != modules:
            raise UserError(
                f"config.engine.group_sizes={tuple(sizes)}: needs one size per module, and "
                f"there are {modules} modules"
            )
        if sum(sizes) > count:
            raise UserError(
                f"config.engine.group_sizes={tuple(sizes)}: needs {sum(sizes)} devices, and there "
                f"are {count} (on the CPU, --cpu_devices=N provides N)"
            )
    elif count >= modules:
        size = count // modules
        if 0 < per_process < count:
            size -= size % per_process if size >= per_process else 0
            size = next(
                n for n in range(size, 0, -1) if n % per_process == 0 or per_process % n == 0
            )
        sizes = [size] * modules
    else:
        total = [0.0, *itertools.accumulate(costs or [1.0] * modules)]
        starts = balanced(lambda first, end, _: total[end] - total[first], modules, count)
        lengths = [end - first for first, end in itertools.pairwise([*starts, modules])]
        return [
            range(device, device + 1)
            for device, length in enumerate(lengths)
            for _ in range(length)
        ]
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes)]


def check_batch(batch_size: int, sizes: Sequence[int], micro_batches: int = 1) -> None:
    """Raises UserError if the batch cannot be split over the devices and into micro-batches.

    Args:
      batch_size: number of examples in a batch.
      sizes: number of devices of each module.
      micro_batches: number of micro-batches per batch, which must divide each device's share of the
        batch.
    """
    for k, size in enumerate(sizes):
        if batch_size % size:
            multiple = math.lcm(*sizes)
            next_multiple = batch_size + multiple - batch_size % multiple
            raise UserError(
                f"config.data.batch_size={batch_size}: not divisible by the {size} devices of "
                f"module_{k}; {next_multiple} would do, or change config.engine.group_sizes"
            )
        share = batch_size // size
        # A micro-batch needs two images: batch norm has no variance over a single one.
        valid_counts = [n for n in range(1, share + 1) if share % n == 0 and batch_size // n > 1]
        if micro_batches not in valid_counts:
            raise UserError(
                f"config.train.accumulate={micro_batches}: must divide the {share} images per "
                f"device of module_{k} into micro-batches of at least 2 images; "
                f"{', '.join(map(str, valid_counts))} would do"
            )


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(
        (len(devices),), ("batch",), devices=list(devices), axis_types=(AxisType.Auto,)
    )
