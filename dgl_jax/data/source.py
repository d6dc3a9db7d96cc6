"""What a source of batches is, and the one kind there is: a data set in memory (or mapped into it)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from dgl_jax.errors import UserError
from dgl_jax.packet import PADDING, Batch, Targets

_VALIDATION, _SUBSET, _EPOCH = range(3)  # which random stream of the seed
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
            raise UserError(f"config.data.batch_size={batch_size}: the {self.count} hosts do not divide it; {works} would do")
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True)
class Examples:
    """One split as it is stored."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]


@dataclass(frozen=True)
class DataSet:
    """A data set as it is stored, before validation images are held out."""

    name: str
    class_names: tuple[str, ...]
    train: Examples
    test: Examples


@runtime_checkable
class Source(Protocol):
    """Batches by number.

    Attributes:
      image_shape: (height, width, channels), after resizing.
      steps_per_epoch: whole batches in the training images; what is left over waits for the next epoch's shuffle.
      mean, std: of each channel, of pixel values scaled to 0 ... 1.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
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


class ArraySource:
    """A data set held in arrays, with validation images held out of the training split.

    Of each class the same share is held out (to a whole image), chosen by the seed; `train_examples` then keeps a
    stratified part of what is left. An example's id is its index in the split as stored, so validation ids are indices
    into the training split.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        batch_size: int,
        seed: int,
        validation_fraction: float = 0.0,
        train_examples: int = 0,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ):
        """Splits; `mean` and `std` empty: those of the images trained on.

        Raises:
          UserError: the training images are fewer than `train_examples` or than a batch, or a mean does not fit the
            channels.
        """
        every = np.arange(len(data.train.labels))
        held_out = np.array([], np.int64)
        if validation_fraction:
            held_out = stratified(data.train.labels, max(1, round(len(every) * validation_fraction)), _random(seed, _VALIDATION))
        kept = np.setdiff1d(every, held_out)
        if train_examples > len(kept):
            raise UserError(
                f"config.data.train_examples={train_examples}: {data.name} has {len(kept)} training images "
                "besides the validation images; 0 takes them all"
            )
        if train_examples:
            kept = kept[stratified(data.train.labels[kept], train_examples, _random(seed, _SUBSET))]
        if batch_size > len(kept):
            raise UserError(f"config.data.batch_size={batch_size}: there are only {len(kept)} training images; at most that")

        self.name = data.name
        self.class_names = data.class_names
        self.num_classes = len(data.class_names)
        height, width, channels = data.train.images.shape[1:]
        self.image_shape = (height, width, channels)
        self.steps_per_epoch = len(kept) // batch_size
        self._batch_size = batch_size
        self._splits = {
            "train": (data.train, kept),
            "validation": (data.train, held_out),
            "test": (data.test, np.arange(len(data.test.labels))),
        }
        for field, values in (("mean", mean), ("std", std)):
            if values and len(values) != channels:
                raise UserError(f"config.data.{field}={values}: one value a channel is needed, and {data.name} has {channels}")
        if not (mean and std):
            found = channel_statistics(data.train.images, kept)
            mean, std = mean or found[0], std or found[1]
        self.mean, self.std = mean, std
        # An epoch's order costs milliseconds and serves all its steps; two of them, for readers on both sides of an
        # epoch's end.
        self._order = lru_cache(maxsize=2)(
            lambda epoch: kept[np.argsort(_random(seed, _EPOCH, epoch).random_raw(len(kept)), kind="stable")]
        )

    def batch(self, step: int, shard: Shard = Shard()) -> Batch:
        """See `Source.batch`.

        Returns:
          A batch of arrays of its own: nobody else writes to them.
        """
        epoch, place = divmod(int(step), self.steps_per_epoch)
        ids = self._order(epoch)[place * self._batch_size : (place + 1) * self._batch_size]
        return _gather(self._splits["train"][0], ids[shard.slice(self._batch_size)], step)

    def batches(self, start: int, shard: Shard = Shard()) -> Iterator[Batch]:
        """See `Source.batches`. No thread reads ahead: a batch of small images takes 0.1 ms to make."""
        step = int(start)
        while True:
            yield self.batch(step, shard)
            step += 1

    def examples(self, split: str) -> int:
        """See `Source.examples`."""
        return len(self._split(split)[1])

    def evaluation(self, split: str, shard: Shard = Shard()) -> Iterator[Batch]:
        """See `Source.evaluation`; `Batch.step` counts the batches of the evaluation."""
        stored, ids = self._split(split)
        part = shard.slice(self._batch_size)
        for step, start in enumerate(range(0, len(ids), self._batch_size)):
            yield _gather(stored, ids[start : start + self._batch_size][part], step, part.stop - part.start)

    def _split(self, split: str) -> tuple[Examples, Int[np.ndarray, "N"]]:
        if split not in self._splits:
            raise ValueError(f"split {split!r}: there are {', '.join(SPLITS)}")
        return self._splits[split]


def stratified(labels: Int[np.ndarray, "N"], count: int, random: np.random.BitGenerator) -> Int[np.ndarray, "count"]:
    """Indices, in increasing order, of `count` examples in which every class has its share to a whole example.

    The examples left over by rounding down go to the classes that lost most, the first of them where they lost the
    same.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count // len(labels)
    lost = sizes * count % len(labels)  # in whole numbers: equal classes must tie exactly
    shares[np.argsort(-lost, kind="stable")[: count - shares.sum()]] += 1
    order = np.argsort(random.random_raw(len(labels)), kind="stable")
    chosen = [order[labels[order] == label][:share] for label, share in zip(classes, shares, strict=True)]
    return np.sort(np.concatenate(chosen))


def channel_statistics(
    images: UInt8[np.ndarray, "N H W C"], ids: Int[np.ndarray, "n"], at_once: int = 4096
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


def _random(seed: int, *stream: int) -> np.random.BitGenerator:
    # Raw bits and a stable sort instead of Generator.permutation: NumPy promises the bits for good, a permutation only
    # until the next release, and a run must be able to resume after an upgrade.
    return np.random.Philox(np.random.SeedSequence([seed, *stream]))


def _gather(stored: Examples, ids: Int[np.ndarray, "n"], step: int, size: int = 0) -> Batch:
    images, labels, numbers = stored.images[ids], stored.labels[ids].astype(np.int32), ids.astype(np.int32)
    missing = max(0, size - len(ids))
    if missing:
        images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
        labels = np.concatenate([labels, np.full(missing, PADDING, np.int32)])
        numbers = np.concatenate([numbers, np.full(missing, PADDING, np.int32)])
    return Batch(images, Targets(labels, numbers), np.asarray(step, np.int32))
