"""Decoding of hand-made images: 16-bit pixels, EXIF orientation, center crop, damaged EXIF."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dgl_jax.data.crops import center_crop
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
        assert image.mode.startswith("I")  # Pillow's own conversion would clip these values
    assert decoded_image(data)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]
    assert decoded_image(data, channels=1)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    # TIFF stores 32 bits and the other byte order as well.
    for dtype in (np.int32, np.dtype(">u2")):
        pixels = decoded_image(encoded(levels.astype(dtype), "TIFF"), channels=1)
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    out_of_range = np.array([[-5, 70000]], np.int32)
    assert decoded_image(encoded(out_of_range, "TIFF"), channels=1)[0, :, 0].tolist() == [0, 255]


def test_eight_bits_are_kept_unchanged():
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
def test_images_are_rotated_by_their_exif_orientation(orientation, expected):
    pixels = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    eight = encoded(pixels, exif=oriented(orientation))
    assert decoded_image(eight, channels=1)[..., 0].tolist() == expected
    sixteen = encoded(pixels.astype(np.uint16) * 257, exif=oriented(orientation))
    assert decoded_image(sixteen, channels=1)[..., 0].tolist() == expected


def test_a_jpeg_is_rotated_by_its_exif_orientation():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 200  # the left half is light; rotating clockwise makes it the upper half
    image = decoded_image(encoded(pixels, "JPEG", quality=95, exif=oriented(6)))
    assert image.shape == (16, 8, 3)
    np.testing.assert_allclose(image[:8].astype(int), 200, atol=4)
    np.testing.assert_allclose(image[8:].astype(int), 0, atol=4)
    upright = decoded_image(encoded(pixels, "JPEG", quality=95))
    assert upright.shape == (8, 16, 3)


def test_center_equals_center_crop_approximately():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    for width, height in ((96, 64), (64, 128)):
        data = encoded(
            np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)),
            "JPEG",
            quality=95,
        )
        middle = decoded_image(data, image_size=28, center=True).astype(int)
        # Only approximately, because Pillow averages when it reduces an image.
        assert np.abs(middle - center_crop(data, 28)).mean() < 4
        assert np.abs(decoded_image(data, image_size=28) - middle).mean() > 10


def test_damaged_exif_leaves_the_image_as_stored():
    pixels = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    data = encoded(pixels)
    junk = b"eXIfgarbage!"
    chunk = struct.pack(">I", len(junk) - 4) + junk + struct.pack(">I", zlib.crc32(junk))
    data = data[:33] + chunk + data[33:]  # after the signature and the header, 33 bytes
    with Image.open(io.BytesIO(data)) as image, pytest.raises(SyntaxError, match="not a TIFF file"):
        image.getexif()
    assert decoded_image(data, channels=1)[..., 0].tolist() == pixels.tolist()
