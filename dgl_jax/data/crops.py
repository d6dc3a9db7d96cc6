"""From the bytes of a photograph to a square of pixels: the random crop of training and the centre crop of evaluation.

simplejpeg decodes (as fast as OpenCV and a third faster than Pillow on JPEGs of 500x375 pixels, and it reads the size at
no cost), OpenCV resizes, bilinearly. Where the part that is needed has at least twice the pixels needed, the decoder
itself halves, quarters or eighths the image, which is faster and averages, so that interpolating between neighbours
never skips a pixel. An EXIF orientation is not followed: the figures that published work gives for ImageNet are of
images as stored.
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

AREA = (0.08, 1.0)  # of the crop, as a share of the image's
ASPECT = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10
DRAWS = (ATTEMPTS, 4)  # numbers that a random crop takes
MARGIN = 256 / 224  # side of the resized image over that of the centre crop
# What reading raises where bytes are no image, or only the first part of one.
UNREADABLE = (OSError, SyntaxError, ValueError)


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def random_box(width: int, height: int, draws: Float[np.ndarray, "attempts 4"]) -> Box:
    """Where a training image is cut (Szegedy et al. 2015): its area uniform in 8 to 100 %, its aspect between 3/4 and 4/3.

    Args:
      draws: uniform in [0, 1); a row decides area, aspect, column and row of one attempt.

    Returns:
      The first attempt that lies inside the image; else the largest centred box of a permitted aspect.
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
    """The part of an encoded image that `random_box` says, as `size` x `size` RGB pixels.

    Raises:
      One of UNREADABLE.
    """
    width, height, simple = _header(data)
    box = random_box(width, height, draws)
    pixels, factor = _decode(data, width, height, simple, min(box.width, box.height) // size)
    left, top, wide, tall = (side // factor for side in box)
    return _resize(pixels[top : top + tall, left : left + wide], size, size)


def centre_crop(data: bytes, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The middle `size` x `size` RGB pixels of an encoded image whose shorter side has become 256/224 times that.

    Raises:
      One of UNREADABLE.
    """
    short = round(size * MARGIN)
    width, height, simple = _header(data)
    least = min(width, height)
    pixels, _ = _decode(data, width, height, simple, least // short)
    width, height = short * width // least, short * height // least
    left, top = (width - size) // 2, (height - size) // 2
    return _resize(pixels, width, height)[top : top + size, left : left + size]


def _header(data: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether it is a JPEG that simplejpeg can make RGB of."""
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        return width, height, colours not in ("CMYK", "YCCK")
    except ValueError:
        with _opened(data) as opened:
            return *opened.size, False


def _decode(
    data: bytes, width: int, height: int, simple: bool, spare: int
) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
    """RGB pixels, and how many times smaller than stored they are: 1, 2, 4 or 8, at most `spare`."""
    import simplejpeg

    if simple:
        factor = next((f for f in (8, 4, 2) if f <= spare), 1)
        # What is only odd, such as bytes that belong to nothing (ImageNet has them), is an error here.
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(
                data, min_height=-(-height // factor), min_width=-(-width // factor)
            ), factor
    # Other forms than JPEG, other colours than RGB, what is odd; and damaged files, of which Pillow says what is wrong.
    with _opened(data) as opened:
        return np.asarray(opened.convert("RGB")), 1


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator["Image.Image"]:
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
