"""Tests of single codecs: exactness, bounded rounding, relative errors, and bytes on the wire."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.codecs import CODECS, Bf16, Identity, make_codec, relative_error
from dgl_jax.config import options
from dgl_jax.types import nbytes


def through(codec, x):
    """Encodes and decodes with a codec that has no codebook."""
    return codec.decode((), codec.encode((), x))


def bits(x):
    return np.asarray(x).view(np.uint32 if x.dtype == jnp.float32 else np.uint16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_changes_no_bit(dtype):
    values = [0.0, -0.0, 1e-40, -1.17549435e-38, 3.4e38, np.inf, -np.inf, np.nan, 1 / 3]
    x = jnp.asarray(np.array(values, np.float32)).astype(dtype)
    codec = make_codec(options("codec", name="identity"), dtype)
    assert codec.lossless
    np.testing.assert_array_equal(bits(through(codec, x)), bits(x))
    np.testing.assert_array_equal(bits(jax.jit(lambda x: through(codec, x))(x)), bits(x))


def test_bf16_is_exact_for_eight_significant_bits():
    # Values with 8 significant bits, at any exponent of a float32.
    x = jnp.asarray(
        [s * m * 2.0**e for s in (-1, 1) for m in (128, 129, 200, 255) for e in (-70, -7, 0, 30)],
        jnp.float32,
    )
    codec = Bf16()
    payload = codec.encode((), x)
    assert payload.dtype == jnp.bfloat16
    assert nbytes(payload) * 2 == nbytes(x)
    np.testing.assert_array_equal(bits(codec.decode((), payload)), bits(x))
    assert float(relative_error(x, codec.decode((), payload))) == 0.0
    x = x * (1 + 2.0**-8)  # a ninth bit
    assert float(relative_error(x, through(codec, x))) > 0


def test_bf16_rounds_to_nearest_even():
    random = np.random.default_rng(0)
    x = (random.normal(size=4096) * 10.0 ** random.integers(-20, 20, 4096)).astype(np.float32)
    decoded = np.asarray(through(Bf16(), jnp.asarray(x)))
    assert decoded.dtype == np.float32
    worst = np.abs(decoded - x) / np.abs(x)
    assert worst.max() <= 2.0**-8
    assert worst.max() > 2.0**-9  # the error of rounding to nine bits
    # Ties go to the even neighbor: 1 + 2^-8 is rounded down, 1 + 3 * 2^-8 up.
    assert np.asarray(
        Bf16().encode((), jnp.float32([1 + 2**-8, 1 + 3 * 2**-8])), np.float32
    ).tolist() == [1.0, 1 + 2**-6]


@pytest.mark.medium
def test_decoded_dtype_equals_that_of_the_activations():
    assert make_codec(options("codec", name="bf16"), "float32") == Bf16("float32")
    assert make_codec(options("codec", name="identity"), "bfloat16") == Identity("bfloat16")
    for name, dtype in [(name, dtype) for name in CODECS for dtype in ("float32", "bfloat16")]:
        dims = {} if name in ("identity", "bf16") else {"dims": 2}
        codec = make_codec(options("codec", name=name, **dims), dtype)
        x = jnp.ones((2, 2), dtype)
        book = codec.codebook(
            codec.publish(codec.init(x), jax.random.key(0), x, jnp.zeros((), jnp.int32))
        )
        assert codec.decode(book, codec.encode(book, x)).dtype == dtype
        assert hash(codec) == hash(make_codec(options("codec", name=name, **dims), dtype))


def test_relative_error_matches_hand_computed_values():
    original = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])
    decoded = jnp.asarray([[3.0, 1.0], [2.0, 2.0]])  # off by (0, 1, 2, -2): 3 of 5
    np.testing.assert_allclose(relative_error(original, decoded), 0.6, rtol=1e-6)
    np.testing.assert_allclose(
        relative_error(original.astype(jnp.bfloat16), decoded), 0.6, rtol=1e-6
    )
    assert float(relative_error(original, original)) == 0.0
    assert float(relative_error(jnp.zeros(2), jnp.zeros(2))) == 0.0


# On the wire


@pytest.mark.slow
def test_bytes_on_the_wire(tiny):
    # 4x4x4 and 2x2x4 float32 per image, plus 4 bytes each for label and id.
    raw = (4 * 4 * 4 * 4 + 8, 2 * 2 * 4 * 4 + 8)
    for run, measured in (
        (tiny.engine("fused"), False),
        (tiny.engine("pipeline", (1, 1, 1)), True),
        (tiny.engine("pipeline"), False),
    ):
        if hasattr(run, "meters"):  # other engines compute traffic from shapes
            tiny.run(run, 2)
        traffic = run.traffic()
        assert traffic.raw == raw
        assert traffic.wire == raw
        assert traffic.measured == measured
    coded = tiny.engine("pipeline", (1, 1), modules=2, augment="crop_flip", codec="bf16")
    _, reports = tiny.run(coded, 2)
    traffic = coded.traffic()
    assert traffic.raw == (2 * 2 * 4 * 4 + 8,)
    assert traffic.wire == (2 * 2 * 4 * 2 + 8,)
    assert traffic.measured
    assert all(0 < float(report[0]["codec_error"]) < 2**-8 for report in reports)
    assert all("codec_error" not in report[-1] for report in reports)
