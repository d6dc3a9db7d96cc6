"""Image classification: augmentation and normalization of whole batches, on the batch's devices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from dgl_jax.config import TaskSettings
from dgl_jax.config.registry import TASKS
from dgl_jax.core import rngs
from dgl_jax.tasks.base import Task, TaskInputs, TaskKind
from dgl_jax.types import AnyArray


def draw_crop_flip(
    key: Key[Array, ""], batch: int, padding: int
) -> tuple[Int[Array, "B 2"], Bool[Array, " B"]]:
    """Draws where each image of a batch is cropped and whether it is mirrored.

    Returns:
      offsets: row and column of the crop's corner in the padded image, uniform over
        0 ... 2 * padding.
      flips: True for half of the images on average.
    """
    # One draw of raw bits: compiling `jax.random.randint` takes a fifth of the time of a step.
    bits = jax.random.bits(key, (batch, 3), jnp.uint32)
    return rngs.below(bits[:, :2], 2 * padding + 1), bits[:, 2] >> 31 == 1


@dataclass(frozen=True)
class ImageClassification(Task):
    """Classification of uint8 images (height, width, channels) with one label each.

    Hashable, so it may be a static argument of a jit.

    Attributes:
      augment: `none`; `crop_flip`, which pads with `padding` black pixels on every side, takes a
        random crop of the original size and mirrors it with probability 1/2; or `inception_crop`,
        which only mirrors with probability 1/2, because the source has already cropped the image.
      mean, std: mean and standard deviation per channel of pixel values scaled to 0 ... 1.
      padding: width of the padding in pixels.
    """

    augment: str = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    padding: int = 4

    def train(
        self, key: Key[Array, ""], images: UInt8[AnyArray, "B H W C"]
    ) -> Float[Array, "B H W C"]:
        """Augments a batch and normalizes it to float32.

        The draws for an image depend on the key and on its position in the batch.
        """
        if self.augment == "crop_flip":
            images = _crop_flip(
                *draw_crop_flip(key, images.shape[0], self.padding),
                self.padding,
                jnp.asarray(images),
            )
        elif self.augment == "inception_crop":
            _, flips = draw_crop_flip(key, images.shape[0], 0)
            images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
        return self.evaluate(images)

    def evaluate(self, images: UInt8[AnyArray, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalizes each channel to (x / 255 - mean) / std, float32."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        scale, shift = np.float32(1 / (255 * std)), np.float32(-mean / std)
        return jnp.asarray(images).astype(jnp.float32) * scale + shift


def _crop_flip(
    offsets: Int[Array, "B 2"],
    flips: Bool[Array, " B"],
    padding: int,
    images: UInt8[Array, "B H W C"],
) -> UInt8[Array, "B H W C"]:
    """Pads, crops and mirrors images in a single gather.

    The vmap lets XLA partition the gather along the batch. The same gather with an index array for
    the examples would make every device of a group fetch the whole batch first.
    """
    _, height, width, _ = images.shape
    rows = offsets[:, :1] + jnp.arange(height) - padding
    columns = offsets[:, 1:] + jnp.arange(width) - padding
    columns = jnp.where(flips[:, None], columns[:, ::-1], columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]

    def take(image: Array, rows: Array, columns: Array) -> Array:
        return image.at[rows[:, None], columns[None, :]].get(mode="promise_in_bounds")

    cut = jax.vmap(take)(images, jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1))
    return jnp.where(inside[..., None], cut, jnp.uint8(0))


def _make(options: TaskSettings, inputs: TaskInputs) -> ImageClassification:
    images = (
        len(inputs.example.shape) == 3 and inputs.example.dtype == np.uint8 and not inputs.label
    )
    inputs.require(
        images, options.name, "uint8 images (height, width, channels) with one label each"
    )
    return ImageClassification(
        inputs.example, augment=inputs.augment, mean=inputs.mean, std=inputs.std
    )


TASKS.ship(image_classification=TaskKind(_make, images=True))
