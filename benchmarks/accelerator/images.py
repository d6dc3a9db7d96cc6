"""Data sets of generated images, in the numbers and sizes of CIFAR-10 and ImageNet."""

from functools import cache

import numpy as np

from benchmarks.accelerator.rows import Size
from dgl_jax.config import DataSettings
from dgl_jax.data import (
    DATA_SETS,
    DataKind,
    DataSet,
    Examples,
    Layout,
    register_data_set,
    synthetic,
)

SMALL, LARGE = "images_like_cifar10", "images_like_imagenet"
_CLASSES = 1000
_TEST = 128  # test images


def fields(name: str, size: Size, batch: int) -> dict[str, object]:
    """Returns the fields of a data set, with at least two batches of training images."""
    return {
        "data.name": name,
        "data.batch_size": batch,
        "data.train_examples": size.images if name == SMALL else 2 * batch,
        "data.image_size": 32 if name == SMALL else size.side,
        "data.validation_fraction": 0.0,
    }


def register() -> None:
    """Registers both data sets, so that a configuration can name them."""
    normalization = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    if SMALL not in DATA_SETS:
        register_data_set(SMALL, DataKind(_small, layout=Layout.images(32, 3, 10), **normalization))
        register_data_set(
            LARGE, DataKind(_large, layout=Layout.images(224, 3, _CLASSES), **normalization)
        )


def _small(settings: DataSettings) -> DataSet:
    return _patterns(settings.train_examples, settings.image_size)


@cache  # all rows of a process train on the same images
def _patterns(count: int, side: int) -> DataSet:
    return synthetic.make(count, _TEST, side)


def _large(settings: DataSettings) -> DataSet:
    random, side = np.random.default_rng(0), settings.image_size

    def noise(count: int) -> Examples:
        images = random.integers(256, size=(count, side, side, 3), dtype=np.uint8)
        return Examples(images, random.integers(_CLASSES, size=count, dtype=np.int32))

    names = tuple(map(str, range(_CLASSES)))
    return DataSet(LARGE, names, noise(settings.train_examples), noise(_TEST))
