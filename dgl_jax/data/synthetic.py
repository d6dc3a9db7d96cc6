"""Data set `synthetic`: generated images that a network can learn, for tests and benchmarks."""

import numpy as np

from dgl_jax.config import DataSettings
from dgl_jax.config.registry import DATA_SETS
from dgl_jax.data.source import DataKind, DataSet, Examples, Layout

_CLASSES = 10
_DEFAULT_SIZE = 32


def load(settings: DataSettings) -> DataSet:
    """Generates 2048 training and 128 test images, the same for every `config.seed`.

    `config.data.image_size` is the side in pixels, by default 32.
    """
    return make(2048, 128, settings.image_size or _DEFAULT_SIZE)


def make(train: int, test: int, image_size: int, seed: int = 0) -> DataSet:
    """Generates RGB images of 10 equally frequent classes.

    Each image is the random pattern of its class (4x4 cells) plus noise of the same strength.

    Args:
      train: number of training images.
      test: number of test images.
      image_size: side in pixels.
      seed: of patterns and noise.
    """
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(_CLASSES, 4, 4, 3)).astype(np.float32)
    places = np.arange(image_size) * 4 // image_size
    patterns = coarse[:, places][:, :, places]
    return DataSet(
        "synthetic",
        tuple(f"pattern_{k}" for k in range(_CLASSES)),
        _draw(random, patterns, train),
        _draw(random, patterns, test),
    )


def _draw(random: np.random.Generator, patterns: np.ndarray, count: int) -> Examples:
    labels = (np.arange(count) % _CLASSES).astype(np.int32)
    images = np.empty((count, *patterns.shape[1:]), np.uint8)
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        noise = random.standard_normal((len(labels[part]), *patterns.shape[1:]), np.float32)
        images[part] = np.clip(127.5 + 40 * (patterns[labels[part]] + noise), 0, 255)
    return Examples(images, labels)


DATA_SETS.ship(synthetic=DataKind(load, layout=Layout.images(_DEFAULT_SIZE, 3, _CLASSES)))
