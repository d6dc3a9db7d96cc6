"""Made-up images that a network can learn: for tests and benchmarks, where no data set should be in the way."""

import numpy as np

from dgl_jax.config import DataSettings
from dgl_jax.data.source import DataKind, DataSet, Examples
from dgl_jax.registry import DATA_SETS

_CLASSES = 10
_DEFAULT_SIZE = 32


def load(settings: DataSettings) -> DataSet:
    """2048 training and 128 test images of `config.data.image_size` (default 32) pixels, the same for every seed."""
    return make(2048, 128, settings.image_size or _DEFAULT_SIZE)


def make(train: int, test: int, image_size: int, seed: int = 0) -> DataSet:
    """Images of 10 equally frequent classes: the class's coarse random pattern in noise as strong as it."""
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


DATA_SETS.ship(synthetic=DataKind(load, shape=(_DEFAULT_SIZE, 3, _CLASSES)))
