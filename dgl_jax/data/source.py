"""Interface of batch sources, and the examples that they draw batches from.

    DataSet or RecordSet  --OrderedSource-->  Source.batch(step, shard)

`Order` (`order.py`) maps the number of a batch to the ids of its examples; a source turns ids into
arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from dgl_jax.config import DataSettings
from dgl_jax.config.fields import option
from dgl_jax.config.registry import Kind
from dgl_jax.errors import UserError
from dgl_jax.types import PADDING, Batch

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """Contiguous slice of each global batch that one host processes.

    Attributes:
      index: number of the slice, from 0.
      count: how many slices of equal size the batch is split into.
    """

    index: int = 0
    count: int = 1

    def slice(self, batch_size: int) -> slice:
        """Returns the slice of a batch of `batch_size` examples.

        Raises:
          UserError: `count` does not divide the batch.
          ValueError: `index` is out of range.
        """
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count}: no such shard")
        if batch_size % self.count:
            works = batch_size + self.count - batch_size % self.count
            raise UserError(
                f"config.data.batch_size={batch_size}: not divisible by the {self.count} hosts; "
                f"{works} would work"
            )
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True)
class Examples:
    """Stored examples of one split.

    Attributes:
      inputs: of shape [N, ...]; of images uint8 [N, H, W, C].
      labels: class numbers, one per example, or several such as [N, T].
    """

    inputs: Shaped[np.ndarray, "N ..."]
    labels: Int[np.ndarray, "N ..."]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """Data set in memory, before validation examples are held out of `train`."""

    name: str
    class_names: tuple[str, ...]
    train: Examples
    test: Examples


class Layout(NamedTuple):
    """Examples of a data set, as known before they are read.

    Attributes:
      example: shape of a stored example.
      dtype: dtype of a stored example.
      label: shape of the label of an example; () for one label per example.
      classes: number of classes.
    """

    example: tuple[int, ...]
    dtype: str
    label: tuple[int, ...]
    classes: int

    @classmethod
    def images(cls, side: int, channels: int, classes: int) -> "Layout":
        """Returns the layout of square uint8 images with one label each.

        Args:
          side: height and width in pixels; of the stored images, or of the crops used in published
            work.
          channels: number of channels.
          classes: number of classes.
        """
        return cls((side, side, channels), "uint8", (), classes)

    def resized(self, side: int) -> "Layout":
        """Returns the layout of images that are resized to `side` pixels; 0 leaves them."""
        return self._replace(example=(side, side, self.example[-1])) if side else self


@dataclass(frozen=True)
class DataKind(Kind):
    """Registered data set: `make(options)` returns a `DataSet` or a `RecordSet`.

    A `DataSet` lies in memory; the images of a `RecordSet` are decoded as needed.

    Attributes:
      layout: shapes of the examples, if known before they are read.
      mean: mean of each channel used in published work; empty: computed from the training images.
      std: standard deviation of each channel, likewise.
      photographs: True if the images are photographs of any proportions, of which the network sees
        the center.
    """

    layout: Layout | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    photographs: bool = False


@dataclass(frozen=True)
class StoredOptions(DataSettings):
    """Options of data sets that are read from a directory.

    Attributes:
      dir: the directory; empty: the project's cache (`folder` needs a directory).
    """

    dir: str = option("", free=True)


@runtime_checkable
class Source(Protocol):
    """Random-access source of batches, the interface of all data sets.

    Attributes:
      name: of the data set.
      num_classes: number of classes.
      class_names: names of the classes, indexed by label.
      example_shape: shape of an example in a batch; of images (height, width, channels) after
        resizing.
      example_dtype: dtype of an example in a batch; of images uint8.
      label_shape: shape of an example's label; () for one label per example.
      steps_per_epoch: number of full batches per epoch; the incomplete last batch is dropped
        (examples are reshuffled every epoch).
      mean: mean of each channel, of pixel values scaled to [0, 1]; empty unless the examples are
        images.
      std: standard deviation of each channel, likewise.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    example_shape: tuple[int, ...]
    example_dtype: str
    label_shape: tuple[int, ...]
    steps_per_epoch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def batch(self, step: int, shard: Shard = Shard()) -> Batch:
        """Returns training batch number `step` of the run, or one host's shard of it.

        The batch must be a pure function of the seed and `step`.
        """

    def batches(self, start: int, shard: Shard = Shard()) -> Iterator[Batch]:
        """Yields `batch(start)`, `batch(start + 1)`, ... without end."""

    def examples(self, split: str) -> int:
        """Returns the number of examples in `train`, `validation` or `test`."""

    def evaluation(self, split: str, shard: Shard = Shard()) -> Iterator[Batch]:
        """Yields every example of a split once, in the order of the ids.

        The last batch is filled up with examples whose label and id are PADDING.
        """


@runtime_checkable
class StoredSource(Source, Protocol):
    """Source of examples that lie in arrays, from which a batch can be gathered by ids."""

    def stored(self, split: str) -> Examples:
        """Returns the stored examples that the ids of a split refer to."""

    def ids(self, step: int, shard: Shard = Shard()) -> Int[np.ndarray, " B"]:
        """Returns the ids of the examples of training batch number `step`."""

    def evaluation_ids(self, split: str, shard: Shard = Shard()) -> Iterator[Int[np.ndarray, " B"]]:
        """Yields the ids of every batch of `evaluation`, the last one filled up with PADDING."""


def check_channels(
    name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Checks that mean and standard deviation, if given, have one value per channel.

    Raises:
      UserError: the number of values differs from `channels`.
    """
    for field, values in (("mean", mean), ("std", std)):
        if values and len(values) != channels:
            raise UserError(
                f"config.data.{field}={values}: needs one value per channel, and {name} has "
                f"{channels} channels"
            )


def padded(
    inputs: Shaped[np.ndarray, "n ..."],
    labels: Int[np.ndarray, "n ..."],
    ids: Int[np.ndarray, " n"],
    step: int,
    size: int = 0,
) -> Batch:
    """Builds a batch and pads it to at least `size` examples.

    Args:
      inputs: the examples.
      labels: their labels; cast to int32.
      ids: their ids; cast to int32.
      step: number of the batch.
      size: least number of examples; the padding has zeros as inputs and PADDING as label and id.
    """
    labels, ids = labels.astype(np.int32), ids.astype(np.int32)
    missing = max(0, size - len(ids))
    if missing:
        inputs = np.concatenate([inputs, np.zeros((missing, *inputs.shape[1:]), inputs.dtype)])
        labels = np.concatenate([labels, np.full((missing, *labels.shape[1:]), PADDING, np.int32)])
        ids = np.concatenate([ids, np.full(missing, PADDING, np.int32)])
    return Batch(inputs, {"label": labels, "id": ids}, np.asarray(step, np.int32))
