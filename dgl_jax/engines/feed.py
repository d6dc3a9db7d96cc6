"""Batches on the devices of the first module, from the host or from a copy of the data set there.

A data set that fits stays on the devices in its stored form (images as uint8). A batch then needs
only the ids of its examples from the host: `select` gathers the examples on the devices.
"""

import logging
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

from dgl_jax import system
from dgl_jax.core.program_cache import cached_program
from dgl_jax.data import Source, StoredSource
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.transfer import placed_shapes, put
from dgl_jax.types import PADDING, Batch

_LOG = logging.getLogger(__name__)
_SHARE = 0.25  # largest share of a device's free memory that a split may take


class Stored(NamedTuple):
    """Examples of a split on devices.

    Attributes:
      inputs: [N, ...], as stored.
      labels: [N, ...], int32.
    """

    inputs: Shaped[jax.Array, "N ..."]
    labels: Int[jax.Array, "N ..."]


class Residence:
    """Keeps splits of a data set on devices, each copied when it is first needed.

    Args:
      mode: "auto" keeps a split on an accelerator if it takes at most a quarter of the memory that
        is free there; "on" always keeps it, also on a CPU; "off" never does.
    """

    def __init__(self, mode: str = "off"):
        self._mode = mode
        # By array and sharding; the entry holds the host array too, so that its id stays valid.
        self._held: dict[tuple[int, NamedSharding], tuple[Any, Stored | None]] = {}

    def stored(self, source: Source, split: str, sharding: NamedSharding) -> Stored | None:
        """Returns the examples of a split on devices; None if batches have to come from the host.

        Args:
          source: source of the examples.
          split: "train", "validation" or "test".
          sharding: sharding that puts whole arrays on each device.
        """
        if self._mode == "off" or not isinstance(source, StoredSource):
            return None
        examples = source.stored(split)
        key = id(examples), sharding
        if key not in self._held:
            labels = examples.labels.astype(np.int32)
            nbytes = examples.inputs.nbytes + labels.nbytes
            copy = None
            if self._mode == "on" or _fits(nbytes, sharding):
                copy = Stored(*put((examples.inputs, labels), sharding))
                where = "the device" if len(sharding.device_set) == 1 else "each device"
                _LOG.info(
                    "%s: %d examples (%.1f MiB) stay on %s",
                    *(source.name, len(examples), nbytes / 2**20, where),
                )
            self._held[key] = examples, copy
        return self._held[key][1]


def _fits(nbytes: int, sharding: NamedSharding) -> bool:
    devices: list[Any] = list(sharding.device_set)
    if any(device.platform == "cpu" for device in devices):
        return False
    free = [system.device_memory(device).free for device in devices]
    return all(each is not None and nbytes <= _SHARE * each for each in free)


def select(stored: Stored | None, batch: Batch) -> Batch:
    """Returns a batch with its examples gathered from `stored`; a pure function.

    Args:
      stored: the split; None if the batch already holds its examples.
      batch: batch whose context holds `id` alone and whose inputs are `()`. Examples with the id
        PADDING become zeros with the label PADDING.
    """
    if stored is None:
        return batch
    ids = batch.context["id"]
    real = ids != PADDING

    def gather(array: jax.Array, padding: int) -> jax.Array:
        rows = array.at[jnp.maximum(ids, 0)].get(mode="promise_in_bounds")
        return jnp.where(real.reshape(-1, *(1,) * (rows.ndim - 1)), rows, padding)

    context = {"label": gather(stored.labels, PADDING), "id": ids}
    return Batch(gather(stored.inputs, 0), context, batch.step)


@cached_program(64)
def _selecting(split: NamedSharding, whole: NamedSharding) -> Any:
    shardings: Any = Batch(split, split, whole)  # type: ignore[arg-type]
    return jax.jit(select, out_shardings=shardings)


class Feed:
    """Supplies training batches to the devices of the first module.

    Args:
      source: random-access source of batches.
      placement: device group of each module.
      residence: keeps the data set on the devices, if it fits.
    """

    def __init__(self, source: Source, placement: Placement, residence: Residence):
        self._source, self._placement = source, placement
        self.stored = residence.stored(source, "train", placement.replicated(0))
        self._batches: Iterator[Batch] | None = None
        self._next = -1  # number of the batch that `_batches` yields next

    def batch(self, number: int) -> Batch:
        """Returns the batch with this number, on the devices.

        Numbers should be consecutive from call to call, because sources read ahead; after a jump
        they start to read again.
        """
        return put_selected(self._read(number), self.stored, self._placement)

    def batches(self, number: int, count: int) -> Batch:
        """Returns `count` consecutive batches with a new leading axis, to scan over.

        Each has to pass through `select` with the attribute `stored`.
        """
        batches = [self._read(i) for i in range(number, number + count)]
        return put_stacked(batches, self._placement)

    def _read(self, number: int) -> Batch:
        if self.stored is not None:
            assert isinstance(self._source, StoredSource)
            ids = self._source.ids(number).astype(np.int32)
            return chosen(ids, number)
        if self._batches is None or number != self._next:
            if isinstance(self._batches, Generator):
                self._batches.close()  # stops the workers that read ahead
            self._batches = self._source.batches(number)
        self._next = number + 1
        return next(self._batches)


def chosen(ids: Int[np.ndarray, " B"], step: int) -> Batch:
    """Returns the host's part, ids and step, of a batch whose examples are on the devices."""
    return Batch((), {"id": ids}, np.asarray(step, np.int32))  # type: ignore[arg-type]


def put_selected(batch: Batch, stored: Stored | None, placement: Placement) -> Batch:
    """Moves a batch to module 0 and gathers its examples there; see `select`."""
    batch = placement.put_batch(batch, 0)
    if stored is None:
        return batch
    selected: Batch = _selecting(placement.split(0), placement.replicated(0))(stored, batch)
    return selected


def put_stacked(batches: list[Batch], placement: Placement) -> Batch:
    """Moves host batches to module 0 with a new leading axis over the batches."""
    return put(jax.tree.map(lambda *arrays: np.stack(arrays), *batches), _stacked(placement))


def stacked_shapes(batch: Batch, count: int, placement: Placement, resident: bool) -> Batch:
    """Returns shapes, dtypes and shardings of a stack of batches.

    Args:
      batch: shapes and dtypes of a batch.
      count: number of batches.
      placement: device group of each module.
      resident: True if the stack holds ids alone, because the examples are on the devices.
    """
    if resident:
        batch = Batch((), {"id": batch.context["id"]}, batch.step)  # type: ignore[arg-type]
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), batch)
    return Batch(*map(placed_shapes, stack, _stacked(placement)))


def _stacked(placement: Placement) -> Batch:
    """Returns the shardings of a stack of batches."""
    split: Any = NamedSharding(placement.groups[0], PartitionSpec(None, "batch"))
    return Batch(split, split, placement.replicated(0))  # type: ignore[arg-type]
