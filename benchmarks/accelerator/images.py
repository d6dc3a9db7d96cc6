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
    return _noise(SMALL, settings.train_examples, settings.image_size, 10)


def _large(settings: DataSettings) -> DataSet:
    return _noise(LARGE, settings.train_examples, settings.image_size, _CLASSES)


@cache  # all rows of a process train on the same images
def _noise(name: str, count: int, side: int, classes: int) -> DataSet:
    random = np.random.default_rng(0)

    def examples(count: int) -> Examples:
        images = random.integers(256, size=(count, side, side, 3), dtype=np.uint8)
        return Examples(images, random.integers(classes, size=count, dtype=np.int32))

    return DataSet(name, tuple(map(str, range(classes))), examples(count), examples(_TEST))
