"""Source of batches from a data set that is held in memory or memory-mapped."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dgl_jax.data.order import OrderedSource
from dgl_jax.data.source import DataSet, Examples, Shard, check_channels, padded
from dgl_jax.types import PADDING, Batch


class ArraySource(OrderedSource):
    """Source of a data set held in arrays.

    Validation examples are held out of the stored training split, see `Order`.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        **order: Any,
    ):
        """Splits the data set and computes the channel statistics that are not given.

        Args:
          data: the stored examples.
          mean: mean of each channel, of images scaled to [0, 1]; empty: computed from the images
            that are trained on. Not used unless the examples are images.
          std: standard deviation of each channel, likewise.
          **order: batch_size, seed, validation_fraction and train_examples; see `Order`.

        Raises:
          UserError: see `Order`; or `mean` or `std` does not have one value per channel.
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
                computed = channel_statistics(data.train.inputs, self._order.splits["train"])
                mean, std = mean or computed[0], std or computed[1]
        self.mean, self.std = mean, std

    def batch(self, step: int, shard: Shard = Shard()) -> Batch:
        """Returns one training batch, see `Source.batch`; the caller may overwrite its arrays."""
        return _gather(self._stored["train"], self.ids(step, shard), step)

    def batches(self, start: int, shard: Shard = Shard()) -> Iterator[Batch]:
        """Yields training batches, see `Source.batches`.

        No thread reads ahead, because a batch of small examples takes only 0.1 ms.
        """
        step = int(start)
        while True:
            yield self.batch(step, shard)
            step += 1

    def stored(self, split: str) -> Examples:
        """Returns the stored examples that the ids of a split refer to."""
        return self._stored[split]

    def ids(self, step: int, shard: Shard = Shard()) -> Int[np.ndarray, " B"]:
        """Returns the ids of one training batch, see `StoredSource.ids`."""
        return self._order.training(int(step))[shard.slice(self._order.batch_size)]

    def evaluation_ids(self, split: str, shard: Shard = Shard()) -> Iterator[Int[np.ndarray, " B"]]:
        """Yields the ids of the batches of a split, see `StoredSource.evaluation_ids`."""
        part = shard.slice(self._order.batch_size)
        for ids in self._order.evaluation(split):
            missing = self._order.batch_size - len(ids)
            yield np.pad(ids, (0, missing), constant_values=PADDING)[part]

    def evaluation(self, split: str, shard: Shard = Shard()) -> Iterator[Batch]:
        """Yields the batches of a split, see `Source.evaluation`; `Batch.step` counts them."""
        part = shard.slice(self._order.batch_size)
        for step, ids in enumerate(self._order.evaluation(split)):
            yield _gather(self._stored[split], ids[part], step, part.stop - part.start)


def channel_statistics(
    images: UInt8[np.ndarray, "N H W C"], ids: Int[np.ndarray, " n"], at_once: int = 4096
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of each channel exactly, from histograms.

    Args:
      images: pixels, which are scaled to [0, 1].
      ids: indices of the images to use.
      at_once: images per chunk; limits the memory.

    Returns:
      The means, and the standard deviations. A constant channel gets the standard deviation 1/255
      (one gray level), so that dividing by it is safe.
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
