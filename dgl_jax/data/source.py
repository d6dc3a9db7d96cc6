"""Interface of batch sources, and the rule that decides which examples a batch holds.

    DataSet or RecordSet  --OrderedSource-->  Source.batch(step, shard)

`Order` maps the number of a batch to the ids of its examples; a source turns ids into arrays.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from dgl_jax.config import DataSettings
from dgl_jax.core import rngs
from dgl_jax.errors import UserError
from dgl_jax.fields import option
from dgl_jax.registry import Kind
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


class Order:
    """Order of the examples of a data set, a function of the seed.

    The same fraction of each class, to a whole example, is held out for validation; the seed
    chooses the examples. `train_examples` then keeps a stratified subset of the rest. Examples with
    several labels are not stratified. The id of an example is its index in the stored split, so
    validation ids are indices into the stored training split.

    Attributes:
      splits: the ids of each of `SPLITS`, in increasing order.
      steps_per_epoch: number of full batches per epoch.
      batch_size: examples per global batch.
    """

    def __init__(
        self,
        name: str,
        train: int,
        test: int,
        labels: Callable[[], Int[np.ndarray, "N ..."]],
        *,
        batch_size: int,
        seed: int,
        validation_fraction: float = 0.0,
        train_examples: int = 0,
    ):
        """Holds out the validation examples and selects the training examples.

        Args:
          name: of the data set, for error messages.
          train: number of stored training examples.
          test: number of stored test examples.
          labels: returns the labels of the stored training examples; called only if a stratified
            draw is needed, because reading all labels may be slow.
          batch_size: examples per global batch.
          seed: decides the held-out examples, the subset and the order.
          validation_fraction: fraction of the stored training examples to hold out.
          train_examples: size of the stratified subset to train on; 0: all that are left.

        Raises:
          UserError: there are fewer training examples than `train_examples` or than `batch_size`.
        """
        held_out = np.array([], np.int64)
        if validation_fraction:
            held_out = stratified(
                labels(),
                max(1, round(train * validation_fraction)),
                rngs.bits(seed, rngs.VALIDATION),
            )
        train_ids = np.setdiff1d(np.arange(train), held_out)
        if train_examples > len(train_ids):
            raise UserError(
                f"config.data.train_examples={train_examples}: {name} has only {len(train_ids)} "
                "training examples after validation is held out; 0 takes all of them"
            )
        if train_examples:
            subset = stratified(labels()[train_ids], train_examples, rngs.bits(seed, rngs.SUBSET))
            train_ids = train_ids[subset]
        if batch_size > len(train_ids):
            raise UserError(
                f"config.data.batch_size={batch_size}: there are only {len(train_ids)} training "
                "examples; use at most that many"
            )
        self.splits = {"train": train_ids, "validation": held_out, "test": np.arange(test)}
        self.steps_per_epoch = len(train_ids) // batch_size
        self.batch_size = batch_size
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def training(self, step: int) -> Int[np.ndarray, " B"]:
        """Returns the ids of the global training batch number `step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _permutation(self, epoch: int) -> Int[np.ndarray, " N"]:
        """Returns the training ids in the order of an epoch."""
        # Computing an order takes milliseconds, so it is kept for all steps of its epoch. Two are
        # kept, because several readers may be on both sides of an epoch boundary.
        if (order := self._orders.get(epoch)) is None:
            ids = self.splits["train"]
            bits = rngs.bits(self._seed, rngs.EPOCH, epoch).random_raw(len(ids))
            order = ids[np.argsort(bits, kind="stable")]
            self._orders = dict([*self._orders.items(), (epoch, order)][-2:])
        return order

    def split(self, split: str) -> Int[np.ndarray, " N"]:
        """Returns the ids of a split.

        Raises:
          ValueError: there is no such split.
        """
        if split not in self.splits:
            raise ValueError(f"split {split!r}: there are {', '.join(SPLITS)}")
        return self.splits[split]

    def evaluation(self, split: str) -> list[Int[np.ndarray, " n"]]:
        """Returns the ids of each batch of an evaluation; the last batch may be shorter."""
        ids = self.split(split)
        return [
            ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)
        ]


class OrderedSource:
    """Base class of the sources: names, sizes and the order of the examples.

    Args:
      data: data set with a name, class names, and `train` and `test` that have a length.
      labels: returns the labels of the stored training examples; see `Order`.
      **order: the other arguments of `Order`: batch_size, seed, validation_fraction and
        train_examples.

    Raises:
      UserError: see `Order`.
    """

    def __init__(self, data: Any, labels: Callable[[], Int[np.ndarray, " N"]], **order: Any):
        self._order = Order(data.name, len(data.train), len(data.test), labels, **order)
        self.name, self.class_names, self.num_classes = (
            data.name,
            data.class_names,
            len(data.class_names),
        )
        self.steps_per_epoch = self._order.steps_per_epoch

    def examples(self, split: str) -> int:
        """Returns the number of examples of a split, see `Source.examples`."""
        return len(self._order.split(split))


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


def stratified(
    labels: Int[np.ndarray, "N ..."], count: int, random: np.random.BitGenerator
) -> Int[np.ndarray, " count"]:
    """Draws `count` examples so that every class keeps its share, to a whole example.

    Shares are rounded down; the missing examples go to the classes that lost most by rounding,
    the first of them in case of a tie. Examples with several labels count as one class.

    Args:
      labels: class of each example; with more than one dimension, all examples form one class.
      count: how many examples to draw.
      random: source of the random numbers.

    Returns:
      Indices of the examples drawn, in increasing order.
    """
    if labels.ndim > 1:
        labels = np.zeros(len(labels), np.int32)
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count // len(labels)
    lost = sizes * count % len(labels)  # integers, so that equal classes tie exactly
    shares[np.argsort(-lost, kind="stable")[: count - shares.sum()]] += 1
    order = np.argsort(random.random_raw(len(labels)), kind="stable")
    chosen = [
        order[labels[order] == label][:share] for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


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
