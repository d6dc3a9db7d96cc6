"""What a source of batches is, which examples a batch holds, and the source of a data set in memory (or mapped into it)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
    """The contiguous slice of each global batch that one host takes: number `index` of `count` equal ones."""

    index: int = 0
    count: int = 1

    def slice(self, batch_size: int) -> slice:
        """The slice of a batch of this many examples.

        Raises:
          UserError: `count` does not divide the batch.
          ValueError: there is no such shard.
        """
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count}: no such shard")
        if batch_size % self.count:
            works = batch_size + self.count - batch_size % self.count
            raise UserError(
                f"config.data.batch_size={batch_size}: the {self.count} hosts do not divide it; {works} would do"
            )
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True)
class Examples:
    """One split as it is stored: class numbers are the labels, one an example, or a row such as (T,) of them."""

    inputs: Shaped[np.ndarray, "N ..."]
    labels: Int[np.ndarray, "N ..."]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """A data set as it is stored, before validation examples are held out."""

    name: str
    class_names: tuple[str, ...]
    train: Examples
    test: Examples


@dataclass(frozen=True)
class DataKind(Kind):
    """A data set: `make(options)` returns a `DataSet` (in memory) or a `RecordSet` (decoded as needed).

    Attributes:
      shape: of images with one label each, where known before they are read: pixels a side (as stored, or as published work crops
        them), channels and classes.
      mean, std: of each channel as published work uses them; else those of the training images.
      photographs: images are cut from photographs of any proportions: of these a network sees the middle.
    """

    shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    photographs: bool = False


@dataclass(frozen=True)
class StoredOptions(DataSettings):
    """Of sets that lie on the disk."""

    dir: str = option("", free=True)  # empty: the project's own cache


@runtime_checkable
class Source(Protocol):
    """Batches by number.

    Attributes:
      example_shape, example_dtype: of an example as a batch holds it; of images (height, width, channels), after resizing.
      label_shape: of the label of an example.
      steps_per_epoch: whole batches in the training examples; what is left over waits for the next epoch's shuffle.
      mean, std: of each channel, of pixel values scaled to 0 ... 1; empty unless the examples are images.
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
        """Training batch number `step` of the run, or one host's part of it: a pure function of the seed and `step`."""

    def batches(self, start: int, shard: Shard = Shard()) -> Iterator[Batch]:
        """`batch(start)`, `batch(start + 1)`, ... without end."""

    def examples(self, split: str) -> int:
        """How many examples `train`, `validation` or `test` has."""

    def evaluation(self, split: str, shard: Shard = Shard()) -> Iterator[Batch]:
        """Every example of a split once, in the order of the ids; label and id PADDING fill the last batch up."""


class Order:
    """Which examples each batch holds: a function of the seed.

    Of each class the same share is held out (to a whole example), chosen by the seed; `train_examples` then keeps a
    stratified part of what is left. Examples of several labels are drawn without regard to them. An example's id is its
    index in the split as stored, so validation ids are indices into the training split.

    Attributes:
      splits: the ids of each of `SPLITS`, in increasing order.
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
        """Splits.

        Args:
          name: what to call the data set in an error message.
          train, test: examples stored.
          labels: those of the training examples; called only where something has to be stratified.

        Raises:
          UserError: the training examples are fewer than `train_examples` or than a batch.
        """
        held_out = np.array([], np.int64)
        if validation_fraction:
            held_out = stratified(
                labels(),
                max(1, round(train * validation_fraction)),
                rngs.bits(seed, rngs.VALIDATION),
            )
        kept = np.setdiff1d(np.arange(train), held_out)
        if train_examples > len(kept):
            raise UserError(
                f"config.data.train_examples={train_examples}: {name} has {len(kept)} training examples "
                "besides those of the validation; 0 takes them all"
            )
        if train_examples:
            kept = kept[stratified(labels()[kept], train_examples, rngs.bits(seed, rngs.SUBSET))]
        if batch_size > len(kept):
            raise UserError(
                f"config.data.batch_size={batch_size}: there are only {len(kept)} training examples; at most that"
            )
        self.splits = {"train": kept, "validation": held_out, "test": np.arange(test)}
        self.steps_per_epoch = len(kept) // batch_size
        self.batch_size = batch_size
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def training(self, step: int) -> Int[np.ndarray, " B"]:
        """Ids of a training batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._of_epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _of_epoch(self, epoch: int) -> Int[np.ndarray, " N"]:
        # An epoch's order costs milliseconds and serves all its steps; the last one is kept besides, for readers on both
        # sides of an epoch's end.
        if (order := self._orders.get(epoch)) is None:
            kept = self.splits["train"]
            order = kept[
                np.argsort(
                    rngs.bits(self._seed, rngs.EPOCH, epoch).random_raw(len(kept)), kind="stable"
                )
            ]
            self._orders = dict([*self._orders.items(), (epoch, order)][-2:])
        return order

    def split(self, split: str) -> Int[np.ndarray, " N"]:
        """Ids of a split."""
        if split not in self.splits:
            raise ValueError(f"split {split!r}: there are {', '.join(SPLITS)}")
        return self.splits[split]

    def evaluation(self, split: str) -> list[Int[np.ndarray, " n"]]:
        """Ids of each batch of an evaluation; the last batch may have fewer."""
        ids = self.split(split)
        return [
            ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)
        ]


class OrderedSource:
    """What the sources of data sets share: an order in which examples come.

    Args:
      data: has a name, class names, and `train` and `test` of some length.
      labels: those of the training examples; see `Order`.
      order: the other arguments of `Order`: batch_size, seed, validation_fraction, train_examples.

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
        """See `Source.examples`."""
        return len(self._order.split(split))


def check_channels(
    name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Raises UserError where a mean or standard deviation is given and has not one value a channel."""
    for field, values in (("mean", mean), ("std", std)):
        if values and len(values) != channels:
            raise UserError(
                f"config.data.{field}={values}: one value a channel is needed, and {name} has {channels}"
            )


def stratified(
    labels: Int[np.ndarray, "N ..."], count: int, random: np.random.BitGenerator
) -> Int[np.ndarray, " count"]:
    """Indices, in increasing order, of `count` examples in which every class has its share to a whole example.

    The examples left over by rounding down go to the classes that lost most, the first of them where they lost the
    same. Examples with several labels count as one class.
    """
    if labels.ndim > 1:
        labels = np.zeros(len(labels), np.int32)
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count // len(labels)
    lost = sizes * count % len(labels)  # in whole numbers: equal classes must tie exactly
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
    """A batch of at least `size` examples: inputs of zeros whose labels and id are PADDING come last."""
    labels, ids = labels.astype(np.int32), ids.astype(np.int32)
    missing = max(0, size - len(ids))
    if missing:
        inputs = np.concatenate([inputs, np.zeros((missing, *inputs.shape[1:]), inputs.dtype)])
        labels = np.concatenate([labels, np.full((missing, *labels.shape[1:]), PADDING, np.int32)])
        ids = np.concatenate([ids, np.full(missing, PADDING, np.int32)])
    return Batch(inputs, {"label": labels, "id": ids}, np.asarray(step, np.int32))
