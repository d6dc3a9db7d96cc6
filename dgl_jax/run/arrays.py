"""Arrays of a checkpoint: their form in the files, finite values and checksums.

Random keys are stored as the integers they consist of. Orbax writes no array that lives in only one
of several processes. With several processes the first one therefore collects all arrays in host
memory. Orbax writes its arrays; the others give it zeros of the same shapes.
"""

import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgl_jax.core.program_cache import cached_program
from dgl_jax.engines import EngineState, world
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.transfer import is_here, put


def all_finite(state: EngineState) -> list[bool]:
    """Checks that the parameters and batch statistics of the modules are finite.

    Blocks until the arrays are computed. They are checked on the host, where a checkpoint needs
    them anyway, so that nothing has to be compiled.

    Returns:
      One entry per module, True if all its values are finite.
    """
    # One transfer per module; one per array would wait for each.
    values = (jax.device_get((module.params, module.batch_stats)) for module in state.modules)
    return [all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)) for tree in values]


def checksum(tree: Any) -> int:
    """Returns the CRC-32 of the bytes of all arrays in a pytree."""
    value = 0
    for leaf in jax.tree.leaves(raw(tree)):
        value = zlib.crc32(
            np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data, value
        )
    return value


def raw(tree: Any) -> Any:
    """Returns a pytree of arrays, or of shapes and dtypes, with random keys as integers."""

    def convert(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if is_here(leaf):
            return jax.random.key_data(leaf)
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(convert, tree)


class OtherShapes(ValueError):
    """Stored arrays are not the ones of a network."""


def check_shapes(name: str, stored: Any, wanted: Any) -> None:
    """Compares two pytrees of shapes.

    Args:
      name: what they describe, for the message.
      stored: shapes of stored arrays, in nested dicts and sequences; empty if they cannot be read.
      wanted: shapes of the arrays to read.

    Raises:
      OtherShapes: they differ; the message names the first array.
    """
    held, asked = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, wanted)
    )
    if not held:
        return  # unreadable
    for array in sorted(held.keys() | asked.keys()):
        shapes = [str(tree.get(array, "missing")) for tree in (held, asked)]
        if shapes[0] != shapes[1]:
            raise OtherShapes(f"the shape of {name}/{array} is {shapes[0]}, not {shapes[1]}")


def typed(tree: Any, like: Any) -> Any:
    """Returns a pytree with its random keys restored; the inverse of `raw`.

    Args:
      tree: pytree that `raw` has returned.
      like: shapes and dtypes of the original pytree.
    """

    def restore(leaf: Any, shape: Any) -> Any:
        if not _is_key(shape):
            return leaf
        return jax.random.wrap_key_data(leaf, impl=_implementation(shape))

    return jax.tree.map(restore, tree, like)


def target(shapes: Any, sharding: Any) -> Any:
    """Returns what Orbax reads arrays into: NumPy arrays if there are several processes.

    Args:
      shapes: shapes and dtypes of the arrays.
      sharding: sharding to read them onto in a run of one process.
    """

    def make(leaf: Any) -> Any:
        if world.count() > 1:
            return np.zeros(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(make, raw(shapes))


def collected(state: EngineState, placement: Placement) -> EngineState:
    """Returns the state with all arrays in the first process; zeros in the others.

    A run of one process returns the state unchanged.

    Args:
      state: state of a synchronous engine.
      placement: device groups of its modules.
    """
    if world.count() == 1:
        return state
    modules = tuple(_on_first(k, raw(m), placement) for k, m in enumerate(state.modules))
    world.barrier()  # the arrays are read: training may overwrite them
    return EngineState(modules, state.flight)


def _on_first(k: int, module: Any, placement: Placement) -> Any:
    leaves, form = jax.tree.flatten(module)
    if placement.mine(k):
        leaves = _whole(leaves, placement.replicated(k))
    owner, devices = placement.processes(k)[0], placement.groups[k].devices.flat
    if owner:
        source = _alone(next(d for d in devices if d.process_index == owner))
        sent = [_part(leaf, source) for leaf in leaves]
        leaves = put(sent, _alone(next(d for d in jax.devices() if d.process_index == 0)))
    host = [
        np.asarray(leaf.addressable_data(0)) if world.first() else np.zeros(leaf.shape, leaf.dtype)
        for leaf in leaves
    ]
    return jax.tree.unflatten(form, host)


def _alone(device: Any) -> NamedSharding:
    """Returns the sharding that puts whole arrays on one device."""
    return NamedSharding(Mesh([device], ("batch",)), PartitionSpec())


def _part(leaf: Any, source: NamedSharding) -> Any:
    """Returns the copy of a replicated array on one device; its shape if that is elsewhere."""
    if is_here(leaf):
        for shard in leaf.addressable_shards:
            if shard.device in source.device_set:
                return jax.make_array_from_single_device_arrays(leaf.shape, source, [shard.data])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=source)


def _whole(leaves: Iterable[Any], replicated: NamedSharding) -> list[Any]:
    """Returns arrays on all devices of their module, such as messages that are split over them."""
    return [leaf if leaf.is_fully_replicated else _replicating(replicated)(leaf) for leaf in leaves]


@cached_program(64)
def _replicating(replicated: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=replicated)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(key: Any) -> Any:
    """Returns the generator that a random key is for, given its shape and dtype."""
    kinds: list[Any] = []
    jax.eval_shape(lambda traced: kinds.append(jax.random.key_impl(traced)), key)
    return kinds[0]
