"""From encoded images to one array; the same code for folders and for TFDS sets."""

import contextlib
import io
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from dgl_jax import system
from dgl_jax.data.crops import MARGIN
from dgl_jax.errors import UserError, needed

if TYPE_CHECKING:
    from PIL import Image

_MODES = {1: "L", 3: "RGB"}
GREY, ALPHA, FRAMES = (
    1,
    2,
    4,
)  # what `image_kinds` finds: no colour; an alpha channel; more frames than the first
# What Pillow raises on EXIF data that is damaged; the image itself may be sound.
_BAD_EXIF = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
)


def decode_images(
    count: int,
    read: Callable[[int], bytes | Path],
    *,
    channels: int,
    image_size: int | tuple[int, int] = 0,
    centre: bool = False,
    describe: Callable[[int], str],
) -> UInt8[np.ndarray, "N H W C"]:
    """Decodes images with Pillow, in threads (which pay: Pillow lets go of the interpreter lock while it decodes).

    Args:
      count: how many images.
      read: the encoded bytes of an image, or the file that holds them; called from several threads.
      channels: 1 (grey) or 3 (RGB); images of another kind are converted, 16 bits a pixel scaled to 8. Images are turned as
        their EXIF orientation says.
      image_size: pixels a side, or (height, width), to resize to (bilinear, with antialiasing); 0: as stored.
      centre: keep the proportions and take the middle, as `crops.centre_crop` does, instead of the whole image.
      describe: what to call an image in an error message.

    Raises:
      UserError: an image cannot be read, or `image_size` is 0 and an image is not as large as the first one.
    """
    with needed("decoding images"):
        from PIL import Image, ImageOps

    wanted = (
        (image_size, image_size) if isinstance(image_size, int) else image_size[::-1]
    )  # as Pillow has it: (width, height)

    def one(index: int) -> np.ndarray:
        data = read(index)
        try:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
                image = _converted(opened, _MODES[channels])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{describe(index)}: not an image that can be read ({error})") from None
        if image_size and centre:
            edge = (1 - 1 / MARGIN) / 2
            image = ImageOps.fit(image, wanted, Image.Resampling.BILINEAR, bleed=edge)
        elif image_size and image.size != wanted:
            image = image.resize(wanted, Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, channels)

    first = one(0)
    images = np.empty((count, *first.shape), np.uint8)

    def some(indices: range) -> None:
        for index in indices:
            image = one(index)
            if image.shape != first.shape:
                raise UserError(
                    f"{describe(index)} has {image.shape[1]}x{image.shape[0]} pixels and {describe(0)} "
                    f"{first.shape[1]}x{first.shape[0]}: set config.data.image_size to resize all of them"
                )
            images[index] = image

    pool = ThreadPoolExecutor(system.cpu_count() or 1)
    try:
        # In order, so that the error raised is that of the first image in error.
        for _ in pool.map(
            some, [range(start, min(start + 256, count)) for start in range(0, count, 256)]
        ):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def image_kinds(files: Sequence[Path]) -> UInt8[np.ndarray, " N"]:
    """Looks at the headers of images: GREY, ALPHA and FRAMES, added up for each; 0 for what is no image."""
    with needed("decoding images"):
        from PIL import Image

    def one(file: Path) -> int:
        try:
            with Image.open(file) as image:
                grey = GREY * (image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"))
                alpha = ALPHA * (image.has_transparency_data or image.mode in ("La", "PA"))
                return grey + alpha + FRAMES * getattr(image, "is_animated", False)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 0  # decoding says what is wrong with it

    with ThreadPoolExecutor(system.cpu_count() or 1) as pool:
        return np.fromiter(pool.map(one, files, chunksize=256), np.uint8, len(files))


def _converted(image: "Image.Image", mode: str) -> "Image.Image":
    """The loaded image, upright, in the mode asked for; itself where nothing is to do."""
    from PIL import Image, ImageOps

    image.load()
    with contextlib.suppress(*_BAD_EXIF):
        ImageOps.exif_transpose(
            image, in_place=True
        )  # the pixels first, then the metadata, which nobody reads here
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of a range that it does not say")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)
