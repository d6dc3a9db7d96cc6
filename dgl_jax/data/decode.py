"""Decoding of encoded images into one array, for image folders and TFDS data sets alike."""

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
# Bits of `image_kinds`: grayscale, has an alpha channel, has more than one frame.
GRAY, ALPHA, FRAMES = (1, 2, 4)
# Exceptions that Pillow raises on damaged EXIF data; the image itself may be intact.
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
    center: bool = False,
    describe: Callable[[int], str],
) -> UInt8[np.ndarray, "N H W C"]:
    """Decodes images with Pillow, in parallel threads.

    Threads help because Pillow releases the interpreter lock while it decodes. Images are rotated
    according to their EXIF orientation.

    Args:
      count: number of images.
      read: returns the encoded bytes of an image, or the file that holds them; called from several
        threads.
      channels: 1 (grayscale) or 3 (RGB). Other images are converted; 16-bit pixels are scaled to 8
        bits.
      image_size: side in pixels, or (height, width), to resize to (bilinear, with antialiasing);
        0 keeps the stored size.
      center: True keeps the proportions and takes the center, as `crops.center_crop` does; False
        resizes the whole image.
      describe: returns the name of an image for error messages.

    Returns:
      The pixels, uint8 of shape [count, height, width, channels].

    Raises:
      UserError: an image cannot be read, or `image_size` is 0 and the images differ in size.
    """
    with needed("decoding images"):
        from PIL import Image, ImageOps

    # Pillow expects (width, height).
    wanted = (image_size, image_size) if isinstance(image_size, int) else image_size[::-1]

    def decode(index: int) -> np.ndarray:
        data = read(index)
        try:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
                image = _converted(opened, _MODES[channels])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{describe(index)}: cannot be read as an image ({error})") from None
        if image_size and center:
            edge = (1 - 1 / MARGIN) / 2
            image = ImageOps.fit(image, wanted, Image.Resampling.BILINEAR, bleed=edge)
        elif image_size and image.size != wanted:
            image = image.resize(wanted, Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, channels)

    first = decode(0)
    images = np.empty((count, *first.shape), np.uint8)

    def decode_chunk(indices: range) -> None:
        for index in indices:
            image = decode(index)
            if image.shape != first.shape:
                raise UserError(
                    f"{describe(index)} has {image.shape[1]}x{image.shape[0]} pixels, but "
                    f"{describe(0)} has {first.shape[1]}x{first.shape[0]}: "
                    "set config.data.image_size to resize all of them"
                )
            images[index] = image

    pool = ThreadPoolExecutor(system.cpu_count() or 1)
    try:
        # `map` keeps the order, so that the first image that fails raises the error.
        chunks = [range(start, min(start + 256, count)) for start in range(0, count, 256)]
        for _ in pool.map(decode_chunk, chunks):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def image_kinds(files: Sequence[Path]) -> UInt8[np.ndarray, " N"]:
    """Reads the headers of images and returns the sum of GRAY, ALPHA and FRAMES for each file.

    The sum is 0 for a file that is not an image.
    """
    with needed("decoding images"):
        from PIL import Image

    def kind(file: Path) -> int:
        try:
            with Image.open(file) as image:
                gray = GRAY * (image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"))
                alpha = ALPHA * (image.has_transparency_data or image.mode in ("La", "PA"))
                return gray + alpha + FRAMES * getattr(image, "is_animated", False)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 0  # decoding raises the error

    with ThreadPoolExecutor(system.cpu_count() or 1) as pool:
        return np.fromiter(pool.map(kind, files, chunksize=256), np.uint8, len(files))


def _converted(image: "Image.Image", mode: str) -> "Image.Image":
    """Loads an image, rotates it upright and converts it to the mode, if needed."""
    from PIL import Image, ImageOps

    image.load()
    # An error may come after the pixels are transposed, while the metadata is rewritten; that is
    # harmless, because the metadata is not used.
    with contextlib.suppress(*_BAD_EXIF):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)
