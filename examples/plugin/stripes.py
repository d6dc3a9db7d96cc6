"""Data set of noisy stripes in eight directions, generated when it is loaded."""

import numpy as np

from dgl_jax.config import DataSettings
from dgl_jax.data import DataKind, DataSet, Examples, Layout, register_data_set

CLASSES = 8


def draw(count: int, size: int, seed: int) -> Examples:
    """Generates grayscale images, uint8 [N, H, W, 1], and the index of each image's direction."""
    random, labels = np.random.default_rng(seed), (np.arange(count) % CLASSES).astype(np.int32)
    rows, columns = np.mgrid[:size, :size]
    angles = np.pi * labels[:, None, None] / CLASSES
    phase = random.uniform(0, 2 * np.pi, (count, 1, 1))
    waves = np.sin(2.0 * (rows * np.sin(angles) + columns * np.cos(angles)) + phase)
    noisy = 127.5 + 60 * waves + 30 * random.standard_normal(waves.shape)
    return Examples(np.clip(noisy, 0, 255).astype(np.uint8)[..., None], labels)


def load(settings: DataSettings) -> DataSet:
    """Returns 512 training and 128 test images of size `config.data.image_size` (default 8)."""
    size = settings.image_size or 8
    return DataSet(
        "stripes",
        tuple(f"direction {k}" for k in range(CLASSES)),
        draw(512, size, 0),
        draw(128, size, 1),
    )


register_data_set("stripes", DataKind(load, layout=Layout.images(8, 1, CLASSES)))
