"""Order of the examples of a data set: which ids a split has, and which ids a batch holds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from dgl_jax.core import rngs
from dgl_jax.data.source import SPLITS
from dgl_jax.errors import UserError


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
