"""Data sets too large for memory (ImageNet, Imagenette), decoded by Grain's workers as needed."""

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
from dgl_jax.config.fields import number
from dgl_jax.config.registry import DATA_SETS
from dgl_jax.core import rngs
from dgl_jax.data import cache, tfds_sets
from dgl_jax.data.crops import DRAWS, UNREADABLE, center_crop, random_crop
from dgl_jax.data.order import OrderedSource
from dgl_jax.data.source import DataKind, Layout, Shard, check_channels, padded
from dgl_jax.data.tfds_sets import Records
from dgl_jax.errors import UserError, require
from dgl_jax.types import Batch

_LOG = logging.getLogger(__name__)

_WHOLE = Shard()
_DEFAULT_SIZE = 224
_THREADS = 16  # limit on decoding threads, because each one holds a batch
_AHEAD = 2  # batches that each worker process prepares in advance


@dataclass(frozen=True)
class RecordSet:
    """Data set of encoded images, before validation images are held out of `train`.

    Attributes:
      name: of the data set.
      class_names: names of the classes, indexed by label.
      train: stored training images.
      test: stored test images.
      image_size: side of the crops, in pixels.
      workers: number of decoding processes; 0: threads of this process decode.
      random_crop: True crops training images at random, False in the center as in evaluation.
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
    """Options of data sets whose images are decoded as needed.

    Attributes:
      workers: number of decoding processes; 0: threads of the training process decode.
    """

    workers: int = number(0, 0, 1024, free=True)


def load(settings: DecodedOptions, tfds_name: str) -> RecordSet:
    """Opens a data set, and prepares it first if needed.

    The published validation images are the `test` split here.

    Args:
      settings: the group `config.data`.
      tfds_name: name of the data set in TFDS.

    Raises:
      UserError: see `tfds_sets.prepared`; or training or validation images are missing.
    """
    # Preparing may take hours, so missing libraries are reported before it.
    require(f"config.data.name={settings.name}", "grain", "simplejpeg", "cv2")
    directory = tfds_sets.prepared(settings, tfds_name)
    info = tfds_sets.open_set(directory).info
    missing = {"train", "validation"} - set(info.splits)
    if missing:
        raise UserError(
            f"{directory} was prepared without {' and '.join(sorted(missing))} images: "
            "prepare it again, or set config.data.dir to another directory"
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
    """Source of uint8 images that are decoded and cropped as a batch needs them.

    Training images are cropped at random, evaluated images in the center (`crops.py`). The crop of
    a training image depends on the seed, the step and the position in the batch. The id of an
    example is its index in the split as TFDS stores it.

    Holding out validation images or training on a subset requires the labels of all training
    images. They are read once and kept in the project's cache. Reading them takes as long as
    reading the files, but the images are not decoded. `config.data.validation_fraction=0` avoids
    it.
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
        """Splits the data set.

        Args:
          data: the stored images.
          seed: decides the held-out images, the order and the crops.
          mean: mean of each channel, of images scaled to [0, 1].
          std: standard deviation of each channel, likewise.
          **order: batch_size, validation_fraction and train_examples; see `Order`.

        Raises:
          UserError: see `Order`; or `mean` or `std` does not have three values.
        """
        check_channels(data.name, 3, mean, std)
        self._data, self._seed = data, seed
        super().__init__(data, lambda: labels(data.train), seed=seed, **order)
        self.example_shape: tuple[int, ...] = (data.image_size, data.image_size, 3)
        self.label_shape: tuple[int, ...] = ()
        self.example_dtype = "uint8"
        self.mean, self.std = mean, std

    def batch(self, step: int, shard: Shard = _WHOLE) -> Batch:
        """Returns one training batch, see `Source.batch`.

        Raises:
          UserError: an image cannot be read.
        """
        return _Training(self, int(step), shard)[0]

    def batches(self, start: int, shard: Shard = _WHOLE) -> Iterator[Batch]:
        """Yields training batches, see `Source.batches`.

        Workers decode ahead; closing the iterator stops them.
        """
        return self._ahead(_Training(self, int(start), shard))

    def evaluation(self, split: str, shard: Shard = _WHOLE) -> Iterator[Batch]:
        """Yields the batches of a split, see `Source.evaluation`; `Batch.step` counts them."""
        return self._ahead(_Evaluation(self, split, shard))

    def training_batch(self, step: int, part: slice) -> Batch:
        """Decodes the slice `part` of the global training batch number `step`."""
        draws = None
        if self._data.random_crop:
            bits = rngs.bits(self._seed, rngs.CROP, step).random_raw(
                self._order.batch_size * DRAWS[0] * DRAWS[1]
            )
            draws = ((bits >> 11) * 2.0**-53).reshape(-1, *DRAWS)[part]
        return self._cut(self._data.train, self._order.training(step)[part], step, 0, draws)

    def evaluation_batch(self, split: str, step: int, part: slice) -> Batch:
        """Decodes the slice `part` of global batch number `step` of an evaluation."""
        stored = self._data.test if split == "test" else self._data.train
        return self._cut(
            stored, self._order.evaluation(split)[step][part], step, part.stop - part.start
        )

    def evaluation_steps(self, split: str) -> int:
        """Returns the number of batches of an evaluation."""
        return len(self._order.evaluation(split))

    def slice_of(self, shard: Shard) -> slice:
        """Returns the slice of each global batch that belongs to a shard."""
        return shard.slice(self._order.batch_size)

    def _cut(
        self,
        stored: Records,
        ids: Int[np.ndarray, " n"],
        step: int,
        size: int,
        draws: Float[np.ndarray, "n attempts 4"] | None = None,
    ) -> Batch:
        """Reads, decodes and crops the images `ids`: at random with `draws`, else in the center."""
        side = self._data.image_size
        images: UInt8[np.ndarray, "n S S 3"] = np.empty((len(ids), side, side, 3), np.uint8)
        batch_labels = np.empty(len(ids), np.int32)
        for place, index in enumerate(ids.tolist()):
            (record,) = stored.read([index])
            batch_labels[place] = record.label
            try:
                if draws is None:
                    images[place] = center_crop(record.image, side)
                else:
                    images[place] = random_crop(record.image, draws[place], side)
            except UNREADABLE as error:
                raise UserError(
                    f"{stored.describe(index)}: cannot be read as an image ({error})"
                ) from None
        return padded(images, batch_labels, ids, step, size)

    def _ahead(self, batches: "_Training | _Evaluation") -> Iterator[Batch]:
        """Yields batches in order, prepared in advance by threads or processes, one batch each."""
        import grain  # not at the top, because importing Grain defines absl flags

        workers = self._data.workers
        threads = 0 if workers else min(_THREADS, system.cpu_count() or 1)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(threads, max(1, threads))
        )
        if workers:
            from absl import flags

            # Grain passes absl's flags to its workers; library users have not parsed any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, _AHEAD))
        iterator = iter(dataset)
        try:
            for batch in iterator:
                # Copy: a worker's shared memory is freed with its array, even if views are alive.
                yield jax.tree.map(np.array, batch) if workers else batch
        finally:
            iterator.close()
            del iterator
            if workers:
                gc.collect()  # Grain's iterators are reference cycles that hold shared memory


@dataclass(frozen=True)
class _Training:
    """Grain data source of the training batches from number `start`."""

    source: RecordSource
    start: int
    shard: Shard

    def __len__(self) -> int:
        return 2**31 - 1 - self.start  # steps are int32

    def __getitem__(self, index: int) -> Batch:
        return self.source.training_batch(self.start + int(index), self.source.slice_of(self.shard))


@dataclass(frozen=True)
class _Evaluation:
    """Grain data source of the batches of one evaluation."""

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
    """Returns the label of every image of a split, from the project's cache or from the files.

    Args:
      records: the split.
      at_once: records read per call.
    """

    def read() -> Int[np.ndarray, " N"]:
        _LOG.info(
            "reading the labels of %d images in %s (only once)", len(records), records.directory
        )
        parts = (
            records.read(range(start, min(start + at_once, len(records))))
            for start in range(0, len(records), at_once)
        )
        return np.array([record.label for part in parts for record in part], np.int32)

    return cache.labels((records.directory.name, records.split), map(Path, records.files), read)


_STATISTICS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DATA_SETS.ship(
    **{
        name: DataKind(
            partial(load, tfds_name=tfds_name),
            DecodedOptions,
            Layout.images(_DEFAULT_SIZE, 3, classes),
            **_STATISTICS,
            photographs=True,
        )
        for name, tfds_name, classes in (
            ("imagenet", "imagenet2012", 1000),
            ("imagenette", "imagenette/320px-v2", 10),
        )
    }
)
