"""Small image folders with random pixels, for tests of the data set `folder` and of runs on it."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ape", "cat", "ñandú")


def random_image(number: int, size=(8, 8), mode: str = "RGB") -> Image.Image:
    """Returns an image of (width, height) pixels that depends on the number alone."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8))


def write_image_folder(root: Path, mode: str = "RGB", size=(8, 8), classes=CLASSES) -> Path:
    """Writes nine training and three test images per class and returns the folder."""
    for split, count in (("train", 9), ("test", 3)):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                random_image(100 * c + i, size, mode).save(root / split / name / f"{i}.png")
    return root
