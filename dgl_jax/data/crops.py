"""Crops of encoded photographs: the random crop of training and the center crop of evaluation.

simplejpeg decodes: on JPEGs of 500x375 pixels it is as fast as OpenCV and a third faster than
Pillow, and it reads the image size at no cost. OpenCV resizes bilinearly. If the required part has
at least twice the pixels needed, the decoder itself reduces the image by 2, 4 or 8. This is faster,
and it averages, so that the bilinear interpolation never skips a pixel. The EXIF orientation is
ignored, because published ImageNet results use the images as stored.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:
    from PIL import Image

AREA = (0.08, 1.0)  # range of the crop's area, as a fraction of the image's area
ASPECT = (3 / 4, 4 / 3)  # range of the crop's width / height
ATTEMPTS = 10
DRAWS = (ATTEMPTS, 4)  # shape of the random numbers that one random crop consumes
MARGIN = 256 / 224  # shorter side of the resized image / side of its center crop
# Exceptions raised when the bytes are not an image, or are a truncated one.
UNREADABLE = (OSError, SyntaxError, ValueError)


class Box(NamedTuple):
    """Rectangular part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def random_box(width: int, height: int, draws: Float[np.ndarray, "attempts 4"]) -> Box:
    """Chooses the random crop of a training image (Szegedy et al. 2015).

    The area is uniform between 8 and 100 % of the image, the aspect ratio log-uniform between 3/4
    and 4/3.

    Args:
      width: of the image, in pixels.
      height: of the image, in pixels.
      draws: uniform in [0, 1); each row decides area, aspect, column and row of one attempt.

    Returns:
      The first attempt that lies inside the image; if none does, the largest centered box with an
      aspect ratio in the permitted range.
    """
    low, high = map(math.log, ASPECT)
    for area, aspect, column, row in draws.tolist():
        pixels = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        ratio = math.exp(low + (high - low) * aspect)
        wide, tall = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return Box(int(column * (width - wide + 1)), int(row * (height - tall + 1)), wide, tall)
    wide = min(width, max(1, round(height * ASPECT[1])))
    tall = min(height, max(1, round(width / ASPECT[0])))
    return Box((width - wide) // 2, (height - tall) // 2, wide, tall)


def random_crop(
    data: bytes, draws: Float[np.ndarray, "attempts 4"], size: int
) -> UInt8[np.ndarray, "S S 3"]:
    """Decodes the part of an image that `random_box` chooses.

    Args:
      data: the encoded image.
      draws: see `random_box`.
      size: side of the result, in pixels.

    Returns:
      RGB pixels of shape [size, size, 3].

    Raises:
      OSError, SyntaxError or ValueError (`UNREADABLE`): the image cannot be decoded.
    """
    width, height, simple = _header(data)
    box = random_box(width, height, draws)
    pixels, factor = _decode(data, width, height, simple, min(box.width, box.height) // size)
    left, top, wide, tall = (side // factor for side in box)
    return _resize(pixels[top : top + tall, left : left + wide], size, size)


def center_crop(data: bytes, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Decodes the center of an image that is resized so that its shorter side is 256/224 * `size`.

    Args:
      data: the encoded image.
      size: side of the result, in pixels.

    Returns:
      RGB pixels of shape [size, size, 3].

    Raises:
      OSError, SyntaxError or ValueError (`UNREADABLE`): the image cannot be decoded.
    """
    short = round(size * MARGIN)
    width, height, simple = _header(data)
    least = min(width, height)
    pixels, _ = _decode(data, width, height, simple, least // short)
    width, height = short * width // least, short * height // least
    left, top = (width - size) // 2, (height - size) // 2
    return _resize(pixels, width, height)[top : top + size, left : left + size]


def _header(data: bytes) -> tuple[int, int, bool]:
    """Returns width, height, and True if it is a JPEG that simplejpeg can decode to RGB."""
    import simplejpeg

    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
        return width, height, color_space not in ("CMYK", "YCCK")
    except ValueError:
        with _opened(data) as image:
            return *image.size, False


def _decode(
    data: bytes, width: int, height: int, simple: bool, spare: int
) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
    """Decodes an image to RGB, reduced by the largest of the factors 1, 2, 4, 8 up to `spare`.

    Returns:
      The pixels, and the factor by which they are reduced.
    """
    import simplejpeg

    if simple:
        factor = next((f for f in (8, 4, 2) if f <= spare), 1)
        # simplejpeg rejects harmless oddities that ImageNet has, such as extraneous bytes.
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(
                data, min_height=-(-height // factor), min_width=-(-width // factor)
            ), factor
    # Pillow reads other formats, other color spaces and odd files, and describes damaged ones.
    with _opened(data) as image:
        return np.asarray(image.convert("RGB")), 1


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator["Image.Image"]:
    """Opens an image with Pillow; its DecompressionBombError becomes a ValueError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _resize(
    pixels: UInt8[np.ndarray, "h w 3"], width: int, height: int
) -> UInt8[np.ndarray, "H W 3"]:
    import cv2

    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
