"""Crops of photographs: where they are, and their pixels beside plain NumPy on what Pillow decodes."""

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
    centre_crop,
    random_box,
    random_crop,
)

SIZE = 28  # hence 32 pixels for the shorter side


def photo(width, height, seed=0):
    """A smooth image: what one decoder rounds up and another down stays small."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **kwargs):
    file = io.BytesIO()
    image.save(file, form, **({"quality": 95} if form == "JPEG" else {}), **kwargs)
    return file.getvalue()


def decoded(data, factor=1):
    """What Pillow's decoder makes of it, smaller by a factor."""
    with Image.open(io.BytesIO(data)) as image:
        if factor > 1:
            image.draft("RGB", (image.width // factor, image.height // factor))
        return np.asarray(image.convert("RGB")).astype(np.float64)


def bilinear(pixels, width, height):
    """Interpolates between the centres of pixels, without antialiasing; beyond the outermost centres it repeats them."""
    for axis, size in ((0, height), (1, width)):
        length = pixels.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        first = np.minimum(place.astype(int), length - 2)
        weight = np.expand_dims(place - first, [d for d in range(3) if d != axis])
        pixels = pixels.take(first, axis) * (1 - weight) + pixels.take(first + 1, axis) * weight
    return pixels


def draws_for(area, aspect, column, row):
    return np.tile([area, aspect, column, row], (DRAWS[0], 1))


# The middle


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(60, 44, 1), (33, 50, 1), (141, 97, 2), (300, 259, 8), (32, 32, 1)],
)
def test_centre_crop(width, height, factor):
    data = encoded(photo(width, height))
    pixels = decoded(data, factor)
    assert pixels.shape == (-(-height // factor), -(-width // factor), 3)
    wide, tall = (32 * width // min(width, height), 32 * height // min(width, height))
    whole = bilinear(pixels, wide, tall)
    left, top = (wide - SIZE) // 2, (tall - SIZE) // 2
    expected = whole[top : top + SIZE, left : left + SIZE]
    found = centre_crop(data, SIZE)
    assert found.shape == (SIZE, SIZE, 3)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, expected, atol=2)
    # One pixel beside the middle is another crop.
    assert np.abs(found - whole[top - 1 : top - 1 + SIZE, left : left + SIZE]).max() > 4


def test_an_image_smaller_than_the_crop_is_enlarged():
    data = encoded(photo(10, 8))
    assert centre_crop(data, SIZE).shape == (SIZE, SIZE, 3)
    assert random_crop(data, draws_for(0.1, 0.5, 0.5, 0.5), SIZE).shape == (SIZE, SIZE, 3)


# At random


def test_a_box_by_hand():
    # A quarter of 100 x 64 pixels at aspect 1 is 40 x 40; there are 61 columns and 25 rows for its corner.
    quarter = (0.25 - AREA[0]) / (AREA[1] - AREA[0])
    assert random_box(100, 64, draws_for(quarter, 0.5, 0.5, 0.2)) == Box(30, 5, 40, 40)
    # At aspect 4/3 (all but) it is 46 x 35.
    assert random_box(100, 64, draws_for(quarter, 1.0, 0.0, 0.0)) == Box(0, 0, 46, 35)


def test_an_attempt_that_does_not_fit_is_followed_by_the_next():
    draws = draws_for(0.99, 0.5, 0.0, 0.0)  # 99 % of a wide image is no square
    assert random_box(200, 50, draws) == Box(
        66, 0, 67, 50
    )  # in the middle, of the widest permitted aspect
    draws[7] = 0.0, 0.5, 0.0, 0.0
    assert random_box(200, 50, draws) == Box(0, 0, 28, 28)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_a_random_box_lies_inside_the_image(width, height, seed):
    draws = np.random.default_rng(seed).random(DRAWS)
    box = random_box(width, height, draws)
    assert box == random_box(width, height, draws)
    assert 0 <= box.left <= box.left + box.width <= width
    assert 0 <= box.top <= box.top + box.height <= height
    # To half a pixel.
    assert box.width >= 1
    assert box.height >= 1
    assert (box.width - 0.5) / (box.height + 0.5) <= ASPECT[1] or box.height == height
    assert (box.width + 0.5) / (box.height - 0.5) >= ASPECT[0] or box.width == width


def test_random_boxes_are_as_large_and_as_wide_as_they_should_be():
    random = np.random.default_rng(0)
    boxes = np.array([random_box(500, 375, random.random(DRAWS)) for _ in range(4000)])
    areas, aspects = boxes[:, 2] * boxes[:, 3] / (500 * 375), boxes[:, 2] / boxes[:, 3]
    assert areas.min() > 0.99 * AREA[0]
    assert areas.max() > 0.9
    assert ASPECT[0] * 0.98 < aspects.min() < 0.77
    assert ASPECT[1] * 1.02 > aspects.max() > 1.3
    np.testing.assert_allclose(np.log(aspects[areas < 0.5]).mean(), 0, atol=0.02)
    # Small crops are everywhere alike: their corners fill the whole range.
    small = boxes[areas < 0.2]
    np.testing.assert_allclose((small[:, 0] / (500 - small[:, 2])).mean(), 0.5, atol=0.05)
    np.testing.assert_allclose((small[:, 1] / (375 - small[:, 3])).mean(), 0.5, atol=0.05)


@pytest.mark.parametrize(("area", "factor"), [(0.0, 1), (0.1, 2), (0.6, 4)])
def test_random_crop(area, factor):
    data = encoded(photo(200, 180))
    draws = draws_for(area, 0.4, 0.3, 0.7)
    box = random_box(200, 180, draws)
    assert (
        factor * SIZE <= min(box.width, box.height) < 2 * factor * SIZE
    )  # nothing thrown away that is needed
    left, top, wide, tall = (side // factor for side in box)
    pixels = decoded(data, factor)
    found = random_crop(data, draws, SIZE)
    np.testing.assert_allclose(
        found, bilinear(pixels[top : top + tall, left : left + wide], SIZE, SIZE), atol=2
    )
    assert (
        np.abs(
            found - bilinear(pixels[top : top + tall, left + 2 : left + 2 + wide], SIZE, SIZE)
        ).max()
        > 4
    )


# What is no RGB JPEG


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGBA", "PNG")],
)
def test_other_forms(mode, form):
    data = encoded(photo(60, 44).convert(mode), form)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == (form, mode)
    expected = bilinear(decoded(data), 43, 32)[2 : 2 + SIZE, 7 : 7 + SIZE]
    np.testing.assert_allclose(centre_crop(data, SIZE), expected, atol=2)


def test_images_stay_as_stored():
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter to the right
    turned, plain = (
        centre_crop(encoded(photo(60, 44), **kwargs), SIZE) for kwargs in ({"exif": exif}, {})
    )
    np.testing.assert_array_equal(turned, plain)


@pytest.mark.parametrize(
    "what", ["empty", "junk", "header alone", "cut short", "cut in the header"]
)
def test_what_cannot_be_read(what):
    data = encoded(photo(60, 44))
    damaged = {
        "empty": b"",
        "junk": b"no image at all" * 30,
        "header alone": data[: data.index(b"\xff\xda") + 14],
        "cut short": data[: len(data) * 3 // 4],
        "cut in the header": data[:100],
    }[what]
    for cut in (
        lambda d: centre_crop(d, SIZE),
        lambda d: random_crop(d, draws_for(0.5, 0.5, 0.5, 0.5), SIZE),
    ):
        cut(data)  # nothing is wrong yet
        with pytest.raises(UNREADABLE):
            cut(damaged)
