"""Crops of photographs: their boxes, and their pixels compared to NumPy on Pillow's decoding."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dgl_jax.data.crops import (
    AREA,
    ASPECT,
    DRAWS,
    UNREADABLE,
    Box,
    center_crop,
    random_box,
    random_crop,
)

SIZE = 28  # so the shorter side of the resized image has 32 pixels


def photo(width, height, seed=0):
    """Returns a smooth image, on which rounding differences between decoders stay small."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **kwargs):
    file = io.BytesIO()
    image.save(file, form, **({"quality": 95} if form == "JPEG" else {}), **kwargs)
    return file.getvalue()


def decoded(data, factor=1):
    """Decodes with Pillow, reduced by a factor."""
    with Image.open(io.BytesIO(data)) as image:
        if factor > 1:
            image.draft("RGB", (image.width // factor, image.height // factor))
        return np.asarray(image.convert("RGB")).astype(np.float64)


def bilinear(pixels, width, height):
    """Resizes bilinearly between pixel centers, without antialiasing and with edges repeated."""
    for axis, size in ((0, height), (1, width)):
        length = pixels.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        first = np.minimum(place.astype(int), length - 2)
        weight = np.expand_dims(place - first, [d for d in range(3) if d != axis])
        pixels = pixels.take(first, axis) * (1 - weight) + pixels.take(first + 1, axis) * weight
    return pixels


def draws_for(area, aspect, column, row):
    return np.tile([area, aspect, column, row], (DRAWS[0], 1))


# Center crops


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(60, 44, 1), (33, 50, 1), (141, 97, 2), (300, 259, 8), (32, 32, 1)],
)
def test_center_crop_equals_numpy(width, height, factor):
    data = encoded(photo(width, height))
    pixels = decoded(data, factor)
    assert pixels.shape == (-(-height // factor), -(-width // factor), 3)
    wide, tall = (32 * width // min(width, height), 32 * height // min(width, height))
    whole = bilinear(pixels, wide, tall)
    left, top = (wide - SIZE) // 2, (tall - SIZE) // 2
    expected = whole[top : top + SIZE, left : left + SIZE]
    crop = center_crop(data, SIZE)
    assert crop.shape == (SIZE, SIZE, 3)
    assert crop.dtype == np.uint8
    np.testing.assert_allclose(crop, expected, atol=2)
    # A crop that is one pixel off center must fail.
    assert np.abs(crop - whole[top - 1 : top - 1 + SIZE, left : left + SIZE]).max() > 4


def test_an_image_smaller_than_the_crop_is_enlarged():
    data = encoded(photo(10, 8))
    assert center_crop(data, SIZE).shape == (SIZE, SIZE, 3)
    assert random_crop(data, draws_for(0.1, 0.5, 0.5, 0.5), SIZE).shape == (SIZE, SIZE, 3)


# Random crops


def test_random_box_equals_hand_computed_values():
    # A quarter of 100x64 pixels with aspect 1 is 40x40; its corner has 61 columns and 25 rows.
    quarter = (0.25 - AREA[0]) / (AREA[1] - AREA[0])
    assert random_box(100, 64, draws_for(quarter, 0.5, 0.5, 0.2)) == Box(30, 5, 40, 40)
    # With the largest aspect, 4/3, it is 46x35.
    assert random_box(100, 64, draws_for(quarter, 1.0, 0.0, 0.0)) == Box(0, 0, 46, 35)


def test_random_box_takes_the_first_attempt_that_fits_or_a_centered_box():
    draws = draws_for(0.99, 0.5, 0.0, 0.0)  # a square cannot cover 99 % of a wide image
    centered = Box(66, 0, 67, 50)  # with the largest permitted aspect
    assert random_box(200, 50, draws) == centered
    draws[7] = 0.0, 0.5, 0.0, 0.0
    assert random_box(200, 50, draws) == Box(0, 0, 28, 28)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_random_box_lies_inside_the_image(width, height, seed):
    draws = np.random.default_rng(seed).random(DRAWS)
    box = random_box(width, height, draws)
    assert box == random_box(width, height, draws)
    assert 0 <= box.left <= box.left + box.width <= width
    assert 0 <= box.top <= box.top + box.height <= height
    assert box.width >= 1
    assert box.height >= 1
    # The aspect is in its range up to rounding by half a pixel.
    assert (box.width - 0.5) / (box.height + 0.5) <= ASPECT[1] or box.height == height
    assert (box.width + 0.5) / (box.height - 0.5) >= ASPECT[0] or box.width == width


def test_random_boxes_have_the_expected_distribution():
    random = np.random.default_rng(0)
    boxes = np.array([random_box(500, 375, random.random(DRAWS)) for _ in range(4000)])
    areas, aspects = boxes[:, 2] * boxes[:, 3] / (500 * 375), boxes[:, 2] / boxes[:, 3]
    assert areas.min() > 0.99 * AREA[0]
    assert areas.max() > 0.9
    assert ASPECT[0] * 0.98 < aspects.min() < 0.77
    assert ASPECT[1] * 1.02 > aspects.max() > 1.3
    np.testing.assert_allclose(np.log(aspects[areas < 0.5]).mean(), 0, atol=0.02)
    # The corners of small crops are uniform over the image.
    small = boxes[areas < 0.2]
    np.testing.assert_allclose((small[:, 0] / (500 - small[:, 2])).mean(), 0.5, atol=0.05)
    np.testing.assert_allclose((small[:, 1] / (375 - small[:, 3])).mean(), 0.5, atol=0.05)


@pytest.mark.parametrize(("area", "factor"), [(0.0, 1), (0.1, 2), (0.6, 4)])
def test_random_crop_equals_numpy(area, factor):
    data = encoded(photo(200, 180))
    draws = draws_for(area, 0.4, 0.3, 0.7)
    box = random_box(200, 180, draws)
    # The decoder reduces the image as far as possible without losing needed pixels.
    assert factor * SIZE <= min(box.width, box.height) < 2 * factor * SIZE
    left, top, wide, tall = (side // factor for side in box)
    pixels = decoded(data, factor)
    crop = random_crop(data, draws, SIZE)
    expected = bilinear(pixels[top : top + tall, left : left + wide], SIZE, SIZE)
    np.testing.assert_allclose(crop, expected, atol=2)
    # A crop that is two pixels off must fail.
    shifted = bilinear(pixels[top : top + tall, left + 2 : left + 2 + wide], SIZE, SIZE)
    assert np.abs(crop - shifted).max() > 4


# Images that are not RGB JPEGs


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGBA", "PNG")],
)
def test_other_formats_and_color_modes_are_decoded(mode, form):
    data = encoded(photo(60, 44).convert(mode), form)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == (form, mode)
    expected = bilinear(decoded(data), 43, 32)[2 : 2 + SIZE, 7 : 7 + SIZE]
    np.testing.assert_allclose(center_crop(data, SIZE), expected, atol=2)


def test_the_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x112] = 6  # rotate by 90 degrees clockwise
    rotated, plain = (
        center_crop(encoded(photo(60, 44), **kwargs), SIZE) for kwargs in ({"exif": exif}, {})
    )
    np.testing.assert_array_equal(rotated, plain)


@pytest.mark.parametrize(
    "damage", ["empty", "junk", "header only", "truncated", "truncated header"]
)
def test_damaged_images_raise_an_unreadable_error(damage):
    data = encoded(photo(60, 44))
    damaged = {
        "empty": b"",
        "junk": b"no image at all" * 30,
        "header only": data[: data.index(b"\xff\xda") + 14],
        "truncated": data[: len(data) * 3 // 4],
        "truncated header": data[:100],
    }[damage]
    for crop in (
        lambda d: center_crop(d, SIZE),
        lambda d: random_crop(d, draws_for(0.5, 0.5, 0.5, 0.5), SIZE),
    ):
        crop(data)  # the intact image is readable
        with pytest.raises(UNREADABLE):
            crop(damaged)
