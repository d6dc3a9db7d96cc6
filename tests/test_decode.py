"""Decoding by hand-made images: what the files say and Pillow or OpenCV leave to do."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dgl_jax.data.crops import centre_crop
from dgl_jax.data.decode import decode_images


def decoded_image(data, channels=3, **kwargs):
    return decode_images(
        1, lambda i: data, channels=channels, describe=lambda i: "image", **kwargs
    )[0]


def encoded(pixels, form="PNG", **kwargs):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **kwargs)
    return file.getvalue()


def oriented(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def test_sixteen_bits_are_scaled_to_eight():
    levels = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    data = encoded(levels)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode.startswith("I")  # so that Pillow's own conversion would clip
    assert decoded_image(data)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]
    assert decoded_image(data, channels=1)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    # 32 bits, and the other order of bytes, in a form that stores them.
    for kind in (np.int32, np.dtype(">u2")):
        assert decoded_image(encoded(levels.astype(kind), "TIFF"), channels=1)[
            0, :, 0
        ].tolist() == [0, 0, 1, 1, 128, 255]
    beyond = np.array([[-5, 70000]], np.int32)
    assert decoded_image(encoded(beyond, "TIFF"), channels=1)[0, :, 0].tolist() == [0, 255]


def test_eight_bits_stay_as_they_are():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decoded_image(encoded(pixels), channels=1)[..., 0], pixels)
    np.testing.assert_array_equal(decoded_image(encoded(pixels)), np.stack([pixels] * 3, axis=-1))


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [[10, 20, 30], [40, 50, 60]]),
        (2, [[30, 20, 10], [60, 50, 40]]),
        (3, [[60, 50, 40], [30, 20, 10]]),
        (4, [[40, 50, 60], [10, 20, 30]]),
        (5, [[10, 40], [20, 50], [30, 60]]),
        (6, [[40, 10], [50, 20], [60, 30]]),
        (7, [[60, 30], [50, 20], [40, 10]]),
        (8, [[30, 60], [20, 50], [10, 40]]),
    ],
)
def test_images_are_turned_as_their_exif_says(orientation, expected):
    pixels = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    assert (
        decoded_image(encoded(pixels, exif=oriented(orientation)), channels=1)[..., 0].tolist()
        == expected
    )
    sixteen = encoded(pixels.astype(np.uint16) * 257, exif=oriented(orientation))
    assert decoded_image(sixteen, channels=1)[..., 0].tolist() == expected


def test_a_photograph_is_turned():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 200  # the left half is light, hence the upper one after a quarter clockwise
    image = decoded_image(encoded(pixels, "JPEG", quality=95, exif=oriented(6)))
    assert image.shape == (16, 8, 3)
    np.testing.assert_allclose(image[:8].astype(int), 200, atol=4)
    np.testing.assert_allclose(image[8:].astype(int), 0, atol=4)
    upright = decoded_image(encoded(pixels, "JPEG", quality=95))
    assert upright.shape == (8, 16, 3)


def test_the_middle_of_a_photograph():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    for width, height in ((96, 64), (64, 128)):
        data = encoded(
            np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)),
            "JPEG",
            quality=95,
        )
        middle = decoded_image(data, image_size=28, centre=True).astype(int)
        # Not to the pixel: this one averages when it makes smaller.
        assert np.abs(middle - centre_crop(data, 28)).mean() < 4
        assert np.abs(decoded_image(data, image_size=28) - middle).mean() > 10


def test_damaged_exif_leaves_the_image_as_stored():
    pixels = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    data = encoded(pixels)
    junk = b"eXIfgarbage!"
    chunk = struct.pack(">I", len(junk) - 4) + junk + struct.pack(">I", zlib.crc32(junk))
    data = data[:33] + chunk + data[33:]  # after the header, which is always as long
    with Image.open(io.BytesIO(data)) as image, pytest.raises(SyntaxError, match="not a TIFF file"):
        image.getexif()
    assert decoded_image(data, channels=1)[..., 0].tolist() == pixels.tolist()
