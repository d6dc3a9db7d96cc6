"""Which devices each module has, and the one function that moves arrays between them, in either direction."""

import itertools
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
    """A device group (a one-axis mesh) for every module; modules that share devices share the mesh."""

    groups: tuple[Mesh, ...]

    def replicated(self, module: int) -> NamedSharding:
        """The whole array on every device of the module's group: parameters, optimizer state, keys."""
        return NamedSharding(self.groups[module], PartitionSpec())

    def split(self, module: int) -> NamedSharding:
        """The leading (batch) axis cut over the devices of the module's group."""
        return NamedSharding(self.groups[module], PartitionSpec("batch"))

    def message(self, module: int) -> Message:
        """Where the parts of a message are to be on the devices of a module: what belongs to no example is whole on each."""
        split, whole = self.split(module), self.replicated(module)
        return Message(split, whole, whole, split, whole)

    def crosses(self, hop: int) -> bool:
        """Whether what module `hop` hands to module `hop + 1` changes devices."""
        return self.groups[hop] != self.groups[hop + 1]

    def count(self) -> int:
        """How many devices are used."""
        return len({device for group in self.groups for device in group.devices.flat})

    def sizes(self) -> list[int]:
        """How many devices each module has."""
        return [group.size for group in self.groups]

    def put_batch(self, batch: Batch, module: int) -> Batch:
        """Host to the devices of a module: examples split, the step number everywhere."""
        split: Any = self.split(module)
        everywhere: Any = self.replicated(module)
        # In one call: a call costs more than an array does.
        return put(batch, Batch(split, split, everywhere))

    def describe(self) -> str:
        """One line for the log: which devices each module has."""
        names = [",".join(str(d.id) for d in group.devices.flat) for group in self.groups]
        kinds = sorted({system.device_kind(d) for group in self.groups for d in group.devices.flat})
        return f"{', '.join(kinds)}: " + "; ".join(
            f"module {k} on {name}" for k, name in enumerate(names)
        )


def put(tree: Any, sharding: Any) -> Any:
    """Moves a pytree to a sharding (or a pytree of them): from the host or from other devices. The only such call in the package.

    Host arrays are copied first: on the CPU `device_put` may alias an aligned NumPy array, and whoever overwrites that array
    afterwards (a replay ring, a data loader) would change what the device reads. Nothing goes from devices to the host and nothing
    waits for the arrays to be computed.
    """
    leaves, form = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(jax.tree.broadcast(sharding, tree))
    moved = [_ready_to_put(leaf, target) for leaf, target in zip(leaves, wanted, strict=True)]
    # In one call: a call costs more than an array does.
    return jax.tree.unflatten(form, jax.device_put(moved, wanted))


def _ready_to_put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, jax.Array) and not _shard_for_shard(leaf, sharding):
        return _regrouped(leaf, sharding)
    return leaf


def _shard_for_shard(array: jax.Array, sharding: NamedSharding) -> bool:
    """Returns whether the array stays on its devices, or each of its shards is what one of the new devices is to have.

    Also true of an array that is cut along another axis than the first, which no module leaves behind.
    """
    now = array.sharding
    if now.device_set == sharding.device_set or now.num_devices == sharding.num_devices == 1:
        return True
    if now.shard_shape(array.shape)[1:] != array.shape[1:]:
        return True
    if now.num_devices != sharding.num_devices:
        return False
    shards = [list(s.devices_indices_map(array.shape).values()) for s in (now, sharding)]
    return shards[0] == shards[1]


def _regrouped(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Moves an array that is cut otherwise, piece by piece: `device_put` would wait for it and take it through the host."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _regrouped(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    shards, rows = array.addressable_shards, array.shape[0] if array.ndim else 1
    held = [(shard.device, *_bounds(shard.index, rows), shard.data) for shard in shards]
    whole = []
    for n, (device, index) in enumerate(
        sharding.addressable_devices_indices_map(array.shape).items()
    ):
        at, end = _bounds(index, rows)
        pieces = []
        while at < end:
            having = [shard for shard in held if shard[1] <= at < shard[2]]
            _, first, last, data = next(
                (s for s in having if s[0] == device), having[n % len(having)]
            )
            stop = min(last, end)
            piece = (
                data
                if (at, stop) == (first, last)
                else jax.lax.slice_in_dim(data, at - first, stop - first)
            )
            pieces.append(jax.device_put(piece, device))
            at = stop
        whole.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, whole)


def _bounds(index: tuple[slice, ...] | None, rows: int) -> tuple[int, int]:
    """Returns the rows of a shard, which is cut along the first axis or not at all."""
    start, stop, _ = index[0].indices(rows) if index else (0, rows, 1)
    return start, stop


def one_group(devices: Sequence[jax.Device], modules: int) -> Placement:
    """All modules on one group of all the devices."""
    return Placement((_mesh(devices),) * modules)


def assign(
    devices: Sequence[jax.Device],
    modules: int,
    group_sizes: Sequence[int] = (),
    costs: Sequence[float] = (),
) -> Placement:
    """Gives each module its devices.

    With at least one device a module, each gets an equal number of consecutive ones and the rest stays idle; with fewer,
    consecutive modules share a device so that the largest cost on one device is as small as possible. `group_sizes` overrides.

    Raises:
      UserError: `group_sizes` has not one entry a module, or asks for more devices than there are.
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
    """The numbers of the devices that `assign` gives each module, out of `count`; raises what it raises."""
    sizes = list(group_sizes)
    if sizes:
        if len(sizes) != modules:
            raise UserError(
                f"config.engine.group_sizes={tuple(sizes)}: one size a module is needed, and there are {modules}"
            )
        if sum(sizes) > count:
            raise UserError(
                f"config.engine.group_sizes={tuple(sizes)}: needs {sum(sizes)} devices, and there are {count} "
                "(on the CPU, --cpu_devices=N makes N)"
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
    """Raises UserError where a device group does not divide the batch, or `micro_batches` not what each device has of it.

    Args:
      sizes: devices of each module.
    """
    for k, size in enumerate(sizes):
        if batch_size % size:
            works = batch_size + size - batch_size % size
            raise UserError(
                f"config.data.batch_size={batch_size}: the {size} devices of module_{k} do not divide it; "
                f"{works} would do, or another config.engine.group_sizes"
            )
        share = batch_size // size
        # Of one image batch norm has no variance.
        fit = [n for n in range(1, share + 1) if share % n == 0 and batch_size // n > 1]
        if micro_batches not in fit:
            raise UserError(
                f"config.train.accumulate={micro_batches}: must divide the {share} images that each device of module_{k} has "
                f"of a batch, and leave more than one; {', '.join(map(str, fit))} would do"
            )


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(
        (len(devices),), ("batch",), devices=list(devices), axis_types=(AxisType.Auto,)
    )
