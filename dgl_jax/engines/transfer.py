"""Moves of arrays between devices, and from the host to devices; all moves go through this file.

A run may have several processes, and each holds only the arrays on its own devices. In place of an
array that lies elsewhere a process has its `ShapeDtypeStruct` with the sharding. Every process has
to call `put` for every move between processes, in the same order, even if neither end is here: JAX
counts the transfers of each process.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding


def is_here(x: Any) -> bool:
    """Returns True unless `x` stands for an array without any part in this process."""
    return not isinstance(x, jax.ShapeDtypeStruct)


def placed_shapes(tree: Any, sharding: Any) -> Any:
    """Returns shapes and dtypes of a pytree with a sharding, as arguments of `lower`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def put(tree: Any, sharding: Any) -> Any:
    """Moves a pytree from the host or other devices to a sharding (or a pytree of shardings).

    Host arrays are copied first: on the CPU `device_put` may alias an aligned NumPy array, and
    overwriting that array later (as replay rings and data loaders do) would change the values on
    the device. Nothing moves from devices to the host, and the call does not wait for the arrays to
    be computed.

    Args:
      tree: pytree of host or device arrays. Host arrays are the same in all processes.
      sharding: target sharding of all leaves, or a prefix pytree of shardings.

    Returns:
      The pytree with its arrays on the target devices.
    """
    leaves, form = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(jax.tree.broadcast(sharding, tree))
    # One call for all arrays: the overhead is per call, not per array.
    if all(map(_is_local, leaves, wanted)):
        moved = jax.device_put([*map(_ready_to_put, leaves, wanted)], wanted)
    else:
        moved = _put_in_a_world(leaves, wanted)
    return jax.tree.unflatten(form, moved)


def _is_local(leaf: Any, target: NamedSharding) -> bool:
    if not target.is_fully_addressable:
        return False
    return is_here(leaf) and (not isinstance(leaf, jax.Array) or leaf.is_fully_addressable)


def _ready_to_put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, jax.Array) and not _shard_for_shard(leaf, sharding):
        return _regrouped(leaf, sharding)
    return leaf


def _put_in_a_world(leaves: list[Any], wanted: list[NamedSharding]) -> list[Any]:
    """Moves arrays if some of their devices belong to other processes; see `put`."""
    crossing = [
        i
        for i, (leaf, target) in enumerate(zip(leaves, wanted, strict=True))
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        and moves(leaf.sharding, target) == "cross"
    ]
    handles = [_handle(leaves[i]) for i in crossing]
    crossed = jax.device_put(handles, [wanted[i] for i in crossing]) if crossing else []
    moved = dict(zip(crossing, crossed, strict=True))
    return [
        _if_here(moved[i]) if i in moved else _put_inside(leaf, target)
        for i, (leaf, target) in enumerate(zip(leaves, wanted, strict=True))
    ]


def _put_inside(leaf: Any, target: NamedSharding) -> Any:
    """Moves an array that does not change its process, or a host array."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return distribute(leaf, target)
    if not is_here(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)
    return jax.device_put(_ready_to_put(leaf, target), target)


@functools.lru_cache(4096)
def moves(source: Any, target: Any) -> str:
    """Returns how arrays move from one sharding to another.

    Returns:
      "here" if each process keeps its part, "cross" if every part changes its process, and "mixed"
      if only some do, which JAX cannot move.
    """
    if source.device_set == target.device_set:
        return "here"
    processes = [{device.process_index for device in s.device_set} for s in (source, target)]
    if processes[0].isdisjoint(processes[1]):
        return "cross"
    return "here" if processes[0] == processes[1] and len(processes[0]) == 1 else "mixed"


def _handle(leaf: Any) -> jax.Array:
    """Returns an array to move: an array without parts stands for one that lies elsewhere."""
    if isinstance(leaf, jax.Array):
        return leaf
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [], dtype=leaf.dtype)


def _if_here(array: jax.Array) -> Any:
    if array.addressable_shards:
        return array
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def distribute(tree: Any, sharding: Any) -> Any:
    """Places arrays that every process holds completely, without communication.

    Args:
      tree: pytree of host arrays, or of arrays on devices of this process alone.
      sharding: target sharding of all leaves, or a prefix pytree of shardings.

    Returns:
      The pytree on the target devices; `ShapeDtypeStruct`s for arrays without any part here.
    """

    if all(jax.tree.leaves(jax.tree.map(_is_local, tree, jax.tree.broadcast(sharding, tree)))):
        return put(tree, sharding)

    def place(leaf: Any, target: NamedSharding) -> Any:
        if not is_here(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)
        shape, dtype = np.shape(leaf), leaf.dtype
        parts = target.addressable_devices_indices_map(shape)
        if not parts:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=target)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf), target)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        shards = [jax.device_put(host[index].copy(), device) for device, index in parts.items()]
        return jax.make_array_from_single_device_arrays(shape, target, shards, dtype=dtype)

    return jax.tree.map(place, tree, jax.tree.broadcast(sharding, tree))


def put_rows(tree: Any, sharding: Any, processes: int) -> Any:
    """Places host arrays of which each process holds its own rows.

    Args:
      tree: pytree of host arrays; `ShapeDtypeStruct`s in processes that hold no rows.
      sharding: target sharding of all leaves, or a prefix pytree of shardings. Axes that it splits
        hold the rows of this process, other arrays are the same in all of them.
      processes: number of processes that hold rows, in the order of their devices.
    """
    if processes == 1 and all(map(is_here, jax.tree.leaves(tree))):
        return put(tree, sharding)

    def place(leaf: Any, target: NamedSharding) -> Any:
        if isinstance(leaf, jax.Array):  # it is there already
            return put(leaf, target)
        shape = tuple(
            size * (processes if axis is not None and is_here(leaf) else 1)
            for size, axis in zip(np.shape(leaf), (*target.spec, *(None,) * np.ndim(leaf)))
        )
        if not is_here(leaf):
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=target)
        parts = target.addressable_devices_indices_map(shape)
        # The devices of a process are neighbors, so its rows are the ones from its first part on.
        bounds = {
            device: [cut.indices(size) for cut, size in zip(index or (), shape, strict=True)]
            for device, index in parts.items()
        }
        starts = [min(begin for begin, *_ in axis) for axis in zip(*bounds.values())]
        shards = []
        for device, cuts in bounds.items():
            rows = tuple(slice(a - start, b - start) for (a, b, _), start in zip(cuts, starts))
            shards.append(jax.device_put(leaf[rows].copy(), device))
        return jax.make_array_from_single_device_arrays(shape, target, shards, dtype=leaf.dtype)

    return jax.tree.map(place, tree, jax.tree.broadcast(sharding, tree))


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
