"""Sets too large for memory (ImageNet, Imagenette): images are decoded when a batch needs them, by Grain's workers."""

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from dgl_jax import system
from dgl_jax.core import rngs
from dgl_jax.data import cache, tfds_sets
from dgl_jax.data.crops import DRAWS, UNREADABLE, centre_crop, random_crop
from dgl_jax.data.source import DataKind, OrderedSource, Shard, check_channels, padded
from dgl_jax.data.tfds_sets import Records
from dgl_jax.errors import UserError, require
from dgl_jax.fields import number
from dgl_jax.registry import DATA_SETS
from dgl_jax.types import Batch

_LOG = logging.getLogger(__name__)

_WHOLE = Shard()
_DEFAULT_SIZE = 224
_THREADS = 16  # at most, each of which holds a batch
_AHEAD = 2  # batches that a worker process holds ready


@dataclass(frozen=True)
class RecordSet:
    """A data set as it is stored, before validation images are held out.

    Fields:
      image_size: pixels a side of what is cut from each image.
      workers: processes that decode; 0: threads of this one.
      random_crop: of training images; false: they are cut as for an evaluation.
    """

    name: str
    class_names: tuple[str, ...]
    train: Records
    test: Records
    image_size: int
    workers: int
    random_crop: bool


@dataclass(frozen=True)
class DecodedOptions(tfds_sets.FetchedOptions):
    """Of sets that are decoded as a batch needs them."""

    workers: int = number(
        0, 0, 1024, free=True
    )  # processes that decode images; 0: threads of this one


def load(settings: DecodedOptions, tfds_name: str) -> RecordSet:
    """Finds a set, after preparing it where that has not been done; the published validation images are our test images.

    Raises:
      UserError: see `tfds_sets.prepared`, or training or validation images are missing.
    """
    require(
        f"config.data.name={settings.name}", "grain", "simplejpeg", "cv2"
    )  # before hours of preparing
    directory = tfds_sets.prepared(settings, tfds_name)
    info = tfds_sets.open_set(directory).info
    missing = {"train", "validation"} - set(info.splits)
    if missing:
        raise UserError(
            f"{directory} was prepared without {' and '.join(sorted(missing))} images: prepare it again, or elsewhere"
        )
    return RecordSet(
        settings.name,
        tuple(info.features["label"].names),
        Records(directory, "train"),
        Records(directory, "validation"),
        settings.image_size or _DEFAULT_SIZE,
        settings.workers,
        settings.augment == "inception_crop",
    )


class RecordSource(OrderedSource):
    """A `Source` whose images are cut from photographs of any size as a batch needs them; uint8.

    Training images are cut at random, evaluated ones in the middle (`crops.py`); a training image's cut depends on the
    seed, the step and its place in the batch. An example's id is its index in the split as TFDS stores it.

    Holding out validation images, or taking a part of the training images, needs the labels of all of them. They are
    read once, which takes as long as reading the files (the images are not decoded), and kept in the project's cache;
    `config.data.validation_fraction=0` needs none.
    """

    def __init__(
        self,
        data: RecordSet,
        *,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        **order: Any,
    ):
        """Splits.

        Raises:
          UserError: see `OrderedSource`, which takes `seed` and `order`; or `mean` or `std` has not three values.
        """
        check_channels(data.name, 3, mean, std)
        self._data, self._seed = data, seed
        super().__init__(data, lambda: labels(data.train), seed=seed, **order)
        self.example_shape: tuple[int, ...] = (data.image_size, data.image_size, 3)
        self.label_shape: tuple[int, ...] = ()
        self.example_dtype = "uint8"
        self.mean, self.std = mean, std

    def batch(self, step: int, shard: Shard = _WHOLE) -> Batch:
        """See `Source.batch`.

        Raises:
          UserError: an image cannot be read.
        """
        return _Training(self, int(step), shard)[0]

    def batches(self, start: int, shard: Shard = _WHOLE) -> Iterator[Batch]:
        """See `Source.batches`; workers decode ahead. They end with the iterator (`close`)."""
        return self._ahead(_Training(self, int(start), shard))

    def evaluation(self, split: str, shard: Shard = _WHOLE) -> Iterator[Batch]:
        """See `Source.evaluation`; `Batch.step` counts the batches of the evaluation."""
        return self._ahead(_Evaluation(self, split, shard))

    def training_batch(self, step: int, part: slice) -> Batch:
        """A slice of the training batch `step`."""
        draws = None
        if self._data.random_crop:
            bits = rngs.bits(self._seed, rngs.CROP, step).random_raw(
                self._order.batch_size * DRAWS[0] * DRAWS[1]
            )
            draws = ((bits >> 11) * 2.0**-53).reshape(-1, *DRAWS)[part]
        return self._cut(self._data.train, self._order.training(step)[part], step, 0, draws)

    def evaluation_batch(self, split: str, step: int, part: slice) -> Batch:
        """A slice of number `step` of the batches of an evaluation."""
        stored = self._data.test if split == "test" else self._data.train
        return self._cut(
            stored, self._order.evaluation(split)[step][part], step, part.stop - part.start
        )

    def evaluation_steps(self, split: str) -> int:
        """Batches of an evaluation."""
        return len(self._order.evaluation(split))

    def slice_of(self, shard: Shard) -> slice:
        """A host's part of each batch."""
        return shard.slice(self._order.batch_size)

    def _cut(
        self,
        stored: Records,
        ids: Int[np.ndarray, " n"],
        step: int,
        size: int,
        draws: Float[np.ndarray, "n attempts 4"] | None = None,
    ) -> Batch:
        side = self._data.image_size
        images: UInt8[np.ndarray, "n S S 3"] = np.empty((len(ids), side, side, 3), np.uint8)
        found = np.empty(len(ids), np.int32)
        for place, index in enumerate(ids.tolist()):
            (record,) = stored.read([index])
            found[place] = record.label
            try:
                if draws is None:
                    images[place] = centre_crop(record.image, side)
                else:
                    images[place] = random_crop(record.image, draws[place], side)
            except UNREADABLE as error:
                raise UserError(
                    f"{stored.describe(index)}: not an image that can be read ({error})"
                ) from None
        return padded(images, found, ids, step, size)

    def _ahead(self, batches: "_Training | _Evaluation") -> Iterator[Batch]:
        """The batches in order, made ahead of time: whole ones by turns, in threads or processes."""
        import grain  # defines flags when it is imported

        workers = self._data.workers
        threads = 0 if workers else min(_THREADS, system.cpu_count() or 1)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(threads, max(1, threads))
        )
        if workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands its own to its workers; a library's user has parsed none
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, _AHEAD))
        iterator = iter(dataset)
        try:
            for batch in iterator:
                # A worker's arrays are mapped from memory that goes when they do, whoever still looks at a part of them.
                yield jax.tree.map(np.array, batch) if workers else batch
        finally:
            iterator.close()
            del iterator
            if workers:
                gc.collect()  # Grain's iterators are cycles, and hold shared memory


@dataclass(frozen=True)
class _Training:
    """Training batches from `start` on, by number; what Grain takes for a data source."""

    source: RecordSource
    start: int
    shard: Shard

    def __len__(self) -> int:
        return 2**31 - 1 - self.start  # steps are int32

    def __getitem__(self, index: int) -> Batch:
        return self.source.training_batch(self.start + int(index), self.source.slice_of(self.shard))


@dataclass(frozen=True)
class _Evaluation:
    """The batches of an evaluation, by number; what Grain takes for a data source."""

    source: RecordSource
    split: str
    shard: Shard

    def __len__(self) -> int:
        return self.source.evaluation_steps(self.split)

    def __getitem__(self, index: int) -> Batch:
        return self.source.evaluation_batch(
            self.split, int(index), self.source.slice_of(self.shard)
        )


def labels(records: Records, at_once: int = 512) -> Int[np.ndarray, " N"]:
    """Of every image of a split, from the project's cache or from the files."""

    def read() -> Int[np.ndarray, " N"]:
        _LOG.info("reading the labels of %d images in %s, once", len(records), records.directory)
        parts = (
            records.read(range(start, min(start + at_once, len(records))))
            for start in range(0, len(records), at_once)
        )
        return np.array([record.label for part in parts for record in part], np.int32)

    return cache.labels((records.directory.name, records.split), map(Path, records.files), read)


_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DATA_SETS.ship(
    **{
        name: DataKind(
            partial(load, tfds_name=tfds_name),
            DecodedOptions,
            (_DEFAULT_SIZE, 3, classes),
            **_STATISTICS,
            photographs=True,
        )
        for name, tfds_name, classes in (
            ("imagenet", "imagenet2012", 1000),
            ("imagenette", "imagenette/320px-v2", 10),
        )
    }
)
