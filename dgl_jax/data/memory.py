"""The source of a data set in memory (or mapped into it)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dgl_jax.data.source import DataSet, Examples, OrderedSource, Shard, check_channels, padded
from dgl_jax.types import Batch


class ArraySource(OrderedSource):
    """A data set held in arrays, with validation examples held out of the training split as `Order` says."""

    def __init__(
        self,
        data: DataSet,
        *,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        **order: Any,
    ):
        """Splits; `mean` and `std` empty: those of the images trained on, if the examples are images.

        Raises:
          UserError: see `OrderedSource`, which takes `order`; or a mean does not fit the channels.
        """
        super().__init__(data, lambda: data.train.labels, **order)
        self.example_shape, self.example_dtype = (
            data.train.inputs.shape[1:],
            data.train.inputs.dtype.name,
        )
        self.label_shape = data.train.labels.shape[1:]
        self._stored = {"train": data.train, "validation": data.train, "test": data.test}
        if len(self.example_shape) == 3 and self.example_dtype == "uint8":
            check_channels(data.name, self.example_shape[-1], mean, std)
            if not (mean and std):
                found = channel_statistics(data.train.inputs, self._order.splits["train"])
                mean, std = mean or found[0], std or found[1]
        self.mean, self.std = mean, std

    def batch(self, step: int, shard: Shard = Shard()) -> Batch:
        """See `Source.batch`.

        Returns:
          A batch of arrays of its own: nobody else writes to them.
        """
        ids = self._order.training(int(step))
        return _gather(self._stored["train"], ids[shard.slice(self._order.batch_size)], step)

    def batches(self, start: int, shard: Shard = Shard()) -> Iterator[Batch]:
        """See `Source.batches`. No thread reads ahead: a batch of small examples takes 0.1 ms to make."""
        step = int(start)
        while True:
            yield self.batch(step, shard)
            step += 1

    def evaluation(self, split: str, shard: Shard = Shard()) -> Iterator[Batch]:
        """See `Source.evaluation`; `Batch.step` counts the batches of the evaluation."""
        part = shard.slice(self._order.batch_size)
        for step, ids in enumerate(self._order.evaluation(split)):
            yield _gather(self._stored[split], ids[part], step, part.stop - part.start)


def channel_statistics(
    images: UInt8[np.ndarray, "N H W C"], ids: Int[np.ndarray, " n"], at_once: int = 4096
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the chosen images, of pixel values scaled to 0 ... 1; exact.

    A channel without any contrast gets the standard deviation of one grey level, so that dividing by it does no harm.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256))
    for start in range(0, len(ids), at_once):
        part = images[ids[start : start + at_once]]
        for channel in range(channels):
            counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(axis=1) / total)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def _gather(stored: Examples, ids: Int[np.ndarray, " n"], step: int, size: int = 0) -> Batch:
    return padded(stored.inputs[ids], stored.labels[ids], ids, step, size)
