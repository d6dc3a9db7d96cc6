"""`optical_digits`: scikit-learn's 1,797 digits, 8x8 grey, as a TFDS data set; importing this file registers it.

The images come with scikit-learn, so preparing the set needs no network, and no TensorFlow either: images are handed
to TFDS as PNG.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dgl_jax.data.source import stratified

_TEST_EXAMPLES = 359  # a fifth


class OpticalDigits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits (UCI), from scikit-learn; 1438 train and 359 test images.

    Both splits are stratified and keep scikit-learn's order. Grey levels 0 ... 16 are stored as 0 ... 255.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 grey pixels, from UCI through scikit-learn (CC BY 4.0).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        test = stratified(labels, _TEST_EXAMPLES, np.random.Philox(np.random.SeedSequence(0)))
        train = np.setdiff1d(np.arange(len(labels)), test)
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(self, images, labels, ids):
        for i in ids.tolist():
            yield i, {"image": io.BytesIO(png(images[i])), "label": int(labels[i])}


def png(image: np.ndarray) -> bytes:
    """An 8-bit image, encoded without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
