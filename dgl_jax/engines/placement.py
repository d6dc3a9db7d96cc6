"""Device groups of the modules, and the one function that moves arrays between devices."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dgl_jax import system
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
        """Moves a host batch to a module: examples are split, the step number is replicated."""
        split: Any = self.split(module)
        everywhere: Any = self.replicated(module)
        # One call for all arrays: the overhead is per call, not per array.
        return put(batch, Batch(split, split, everywhere))

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
        names = [",".join(str(d.id) for d in group.devices.flat) for group in self.groups]
        kinds = sorted({system.device_kind(d) for group in self.groups for d in group.devices.flat})
        return f"{', '.join(kinds)}: " + "; ".join(
            f"module {k} on {name}" for k, name in enumerate(names)
        )


def placed_shapes(tree: Any, sharding: Any) -> Any:
    """Returns shapes and dtypes of a pytree with a sharding, as arguments of `lower`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def put(tree: Any, sharding: Any) -> Any:
    """Moves a pytree from the host or other devices to a sharding (or a pytree of shardings).

    All such moves in the package go through this function. Host arrays are copied first: on the CPU
    `device_put` may alias an aligned NumPy array, and overwriting that array later (as replay rings
    and data loaders do) would change the values on the device. Nothing moves from devices to the
    host, and the call does not wait for the arrays to be computed.

    Args:
      tree: pytree of host or device arrays.
      sharding: target sharding of all leaves, or a prefix pytree of shardings.

    Returns:
      The pytree with its arrays on the target devices.
    """
    leaves, form = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(jax.tree.broadcast(sharding, tree))
    moved = [_ready_to_put(leaf, target) for leaf, target in zip(leaves, wanted, strict=True)]
    # One call for all arrays: the overhead is per call, not per array.
    return jax.tree.unflatten(form, jax.device_put(moved, wanted))


def _ready_to_put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, jax.Array) and not _shard_for_shard(leaf, sharding):
        return _regrouped(leaf, sharding)
    return leaf


def _shard_for_shard(array: jax.Array, sharding: NamedSharding) -> bool:
    """Returns True if `device_put` can move the array directly, shard by shard, without blocking.

    This is so if the array stays on its devices, or if each of its shards is exactly what one
    target device needs. Also returns True for arrays split along another axis than the first, which
    no module produces.
    """
    source = array.sharding
    if source.device_set == sharding.device_set or source.num_devices == sharding.num_devices == 1:
        return True
    if source.shard_shape(array.shape)[1:] != array.shape[1:]:
        return True
    if source.num_devices != sharding.num_devices:
        return False
    shards = [
        list(placed.devices_indices_map(array.shape).values()) for placed in (source, sharding)
    ]
    return shards[0] == shards[1]


def _regrouped(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Moves an array to a group that splits it differently, one piece of rows at a time.

    A plain `device_put` would wait for the array and take it through the host.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _regrouped(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    shards, rows = array.addressable_shards, array.shape[0] if array.ndim else 1
    source_shards = [(shard.device, *_bounds(shard.index, rows), shard.data) for shard in shards]
    target_shards = []
    for target_index, (device, index) in enumerate(
        sharding.addressable_devices_indices_map(array.shape).items()
    ):
        row, end = _bounds(index, rows)
        pieces = []
        while row < end:
            holders = [shard for shard in source_shards if shard[1] <= row < shard[2]]
            _, first, last, data = next(
                (s for s in holders if s[0] == device), holders[target_index % len(holders)]
            )
            stop = min(last, end)
            piece = (
                data
                if (row, stop) == (first, last)
                else jax.lax.slice_in_dim(data, row - first, stop - first)
            )
            pieces.append(jax.device_put(piece, device))
            row = stop
        target_shards.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, target_shards)


def _bounds(index: tuple[slice, ...] | None, rows: int) -> tuple[int, int]:
    """Returns first and end row of a shard, which is split along the first axis or not at all."""
    start, stop, _ = index[0].indices(rows) if index else (0, rows, 1)
    return start, stop


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
    return Placement(
        tuple(
            _mesh([devices[i] for i in group])
            for group in layout(len(devices), modules, group_sizes, costs)
        )
    )


def layout(
    count: int, modules: int, group_sizes: Sequence[int] = (), costs: Sequence[float] = ()
) -> list[range]:
    """Returns the device indices of each module, as `assign` chooses them.

    Args:
      count: number of available devices.
      modules: number of modules K.
      group_sizes: number of devices per module; empty: chosen as in `assign`.
      costs: relative cost of each module; empty: all equal.

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
        sizes = [count // modules] * modules
    else:
        total = [0.0, *itertools.accumulate(costs or [1.0] * modules)]
        starts = balanced(lambda first, end: total[end] - total[first], modules, count)
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
