"""TFDS data set `optical_digits`: scikit-learn's 1,797 digits, 8x8 pixels in grayscale.

Importing this file registers the data set. Preparing it needs no network, because the images come
with scikit-learn, and no TensorFlow, because TFDS receives the images as PNG.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dgl_jax.data.order import stratified

_TEST_EXAMPLES = 359  # a fifth


class OpticalDigits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of UCI's handwritten digits, with 1438 training and 359 test images.

    Both splits are stratified by class and keep scikit-learn's order. The gray levels 0 to 16 are
    scaled to 0 to 255.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 gray pixels, from UCI through scikit-learn "
            "(CC BY 4.0).",
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
        for index in ids.tolist():
            yield index, {"image": io.BytesIO(png(images[index])), "label": int(labels[index])}


def png(image: np.ndarray) -> bytes:
    """Encodes an 8-bit image losslessly as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
