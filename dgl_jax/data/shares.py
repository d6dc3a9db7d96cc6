"""Data of a run of several processes: each one's rows, or shapes where others hold the rows."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from dgl_jax.data.info import DatasetInfo
from dgl_jax.data.source import SPLITS, Shard, Source
from dgl_jax.types import Batch


class Share:
    """Source that yields the rows of one process, from a source of whole batches.

    Args:
      source: source of the whole batches; its other attributes are attributes of the share.
      shard: the rows of this process.
    """

    def __init__(self, source: Source, shard: Shard):
        self._source, self._shard = source, shard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batch(self, step: int) -> Batch:
        """Returns the rows of training batch number `step`."""
        return self._source.batch(step, self._shard)

    def batches(self, start: int) -> Iterator[Batch]:
        """Yields `batch(start)`, `batch(start + 1)`, ... without end."""
        return self._source.batches(start, self._shard)

    def evaluation(self, split: str) -> Iterator[Batch]:
        """Yields the rows of every batch of a split; see `Source.evaluation`."""
        return self._source.evaluation(split, self._shard)


class Absent:
    """Source in a process that holds no examples: its batches are shapes and dtypes.

    Args:
      facts: description of the data set by a process that has opened it, see `facts`.
    """

    def __init__(self, facts: dict[str, Any]):
        info = DatasetInfo.from_dict(facts["info"])
        self.name, self.class_names = info.name, info.class_names
        self.num_classes = len(info.class_names)
        self.example_shape, self.example_dtype = info.example_shape, info.example_dtype
        self.label_shape, self.mean, self.std = info.label_shape, info.mean, info.std
        self.steps_per_epoch: int = facts["steps_per_epoch"]
        self._examples: dict[str, int] = facts["examples"]
        self._batch_size: int = facts["batch_size"]

    def examples(self, split: str) -> int:
        """Returns the number of examples in `train`, `validation` or `test`."""
        return self._examples[split]

    def batch(self, step: int, shard: Shard = Shard()) -> Batch:
        """Returns the shapes and dtypes of a whole batch."""
        size, integer = self._batch_size, "int32"
        context = {
            "label": jax.ShapeDtypeStruct((size, *self.label_shape), integer),
            "id": jax.ShapeDtypeStruct((size,), integer),
        }
        inputs = jax.ShapeDtypeStruct((size, *self.example_shape), self.example_dtype)
        return Batch(inputs, context, jax.ShapeDtypeStruct((), integer))  # type: ignore[arg-type]

    def batches(self, start: int, shard: Shard = Shard()) -> Iterator[Batch]:
        """Yields the shapes of batches without end."""
        while True:
            yield self.batch(start)

    def evaluation(self, split: str, shard: Shard = Shard()) -> Iterator[Batch]:
        """Yields the shapes of the batches of a split."""
        for step in range(math.ceil(self._examples[split] / self._batch_size)):
            yield self.batch(step)


def facts(source: Source, batch_size: int) -> dict[str, Any]:
    """Returns the JSON values from which `Absent` describes a source.

    Args:
      source: the source.
      batch_size: examples per batch.
    """
    return {
        "info": dataclasses.asdict(DatasetInfo.of(source)),
        "steps_per_epoch": source.steps_per_epoch,
        "examples": {split: source.examples(split) for split in SPLITS},
        "batch_size": batch_size,
    }
