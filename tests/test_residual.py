"""Tests of vector quantization in several stages, alone and as the codec of an engine."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import records, small_config

from dgl_jax import UserError, system, vq
from dgl_jax.codecs import Vq, relative_error, residual
from dgl_jax.train import train_and_evaluate

KEY = jax.random.key(0)
# Jitted, because unjitted calls compile each operation again every time.
init = jax.jit(residual.init, static_argnums=(2, 3, 4))
update = jax.jit(residual.update, static_argnames=("samples",))
encode, decode = jax.jit(vq.encode), jax.jit(vq.decode)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_two_stages_match_hand_computed_codes():
    # Axes: stage, group, entry, value.
    entries = np.array([[[[0, 0], [10, 0]]], [[[1, 1], [-2, 0]]]], np.float32)
    # Nearest to (10, 0) with residual (-2.5, 0.25), and to (0, 0) with residual (2, 2).
    x = np.array([[7.5, 0.25], [2, 2]], np.float32)
    codes = vq.encode(entries, x)
    np.testing.assert_array_equal(codes, [[0b11], [0b00]])  # the first stage is in the lowest bit
    np.testing.assert_array_equal(vq.decode(entries, codes), [[8, 0], [1, 1]])
    other_way_round = vq.decode(entries[::-1], codes)
    np.testing.assert_array_equal(other_way_round, [[8, 0], [1, 1]])
    assert not np.array_equal(vq.encode(entries[::-1], x), codes), (
        "the order of the stages must matter"
    )


@pytest.mark.slow
@pytest.mark.parametrize("codes", [4, pytest.param(16, marks=pytest.mark.full_compile), 300])
def test_one_stage_equals_the_plain_quantizer(codes):
    x = jnp.asarray(normal((4, 6, 6, 8)))
    plain, staged = (
        jax.jit(vq.init, static_argnums=(2, 3))(KEY, x, codes, 4),
        init(KEY, x, 1, codes, 4),
    )
    one = jax.jit(vq.update)
    for n in range(3):
        key, batch = jax.random.fold_in(KEY, n), jnp.asarray(normal((4, 6, 6, 8), n))
        (plain, health), (staged, staged_health) = (
            one(plain, key, batch),
            update(staged, key, batch),
        )
        assert {k: float(v) for k, v in staged_health.items()} == {
            k: float(v) for k, v in health.items()
        }
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), staged, plain)
    sent = encode(staged.entries, x)
    np.testing.assert_array_equal(sent, encode(plain.entries, x))
    np.testing.assert_array_equal(decode(staged.entries, sent), decode(plain.entries, sent))


@cache
def trained(stages, codes, dims, updates=100):
    """Trains on a stream of dependent normal vectors.

    Returns:
      The relative error on unseen vectors, and the metrics of the last update.
    """
    mix = normal((16, 16), 5)

    def stream(n):
        return jnp.maximum(jnp.asarray(normal((16, 64, 16), n) @ mix), 0.0)

    book = init(KEY, stream(0), stages, codes, dims)
    for n in range(updates):
        book, health = update(book, jax.random.fold_in(KEY, n), stream(n))
    x = stream(999)
    return float(relative_error(x, decode(book.entries, encode(book.entries, x)))), health


@pytest.mark.slow
def test_each_stage_lowers_the_error():
    errors = [trained(stages, 32, 8)[0] for stages in (1, 2, 3)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


@pytest.mark.slow
def test_two_stages_beat_one_at_the_same_rate():
    (one, _), (two, health) = trained(1, 32, 8), trained(2, 32, 16)
    assert two < 0.95 * one
    assert float(health["dead"]) < 0.01


@pytest.mark.slow
def test_non_finite_vectors_are_skipped_by_every_stage():
    x = normal((8, 16, 8))
    book = init(KEY, jnp.asarray(x), 2, 16, 4)
    x[2, 3, 1] = np.nan
    new, health = update(book, KEY, jnp.asarray(x), samples=0)
    assert float(health["skipped"]) == 1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new))
    assert not np.array_equal(new.entries[1], book.entries[1])
    start = init(KEY, jnp.asarray(x), 2, 16, 4)
    assert bool(jnp.isfinite(start.entries).all())


def test_default_period_counts_all_stages():
    x = jax.ShapeDtypeStruct((128, 8, 8, 64), "float32")
    assert [Vq(256, 8, stages=s).period(x) for s in (1, 2)] == [10, 10]
    assert Vq(256, 16, stages=2).period(x) == 20
    codec = Vq(256, 16, stages=2)
    book = jax.eval_shape(codec.init, x)["published"]
    sent = jax.eval_shape(codec.encode, book, x)
    assert (sent.shape, sent.dtype) == ((128, 8, 8, 8), "uint8")
    assert jax.eval_shape(codec.decode, book, sent).shape == x.shape


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize(("stages", "codes", "dims"), [(2, 256, 16), (4, 16, 8)])
def test_temporary_memory_stays_under_twice_the_message(stages, codes, dims):
    shape = (128, 16, 16, 32)
    x = jax.ShapeDtypeStruct(shape, "float32")
    book = jax.eval_shape(lambda key, x: residual.init(key, x, stages, codes, dims), KEY, x)
    raw = 4 * np.prod(shape)
    for function, arguments in ((vq.encode, (book.entries, x)), (residual.update, (book, KEY, x))):
        temporary = system.program_plan(jax.jit(function).lower(*arguments).compile()).temporary
        assert temporary < 2 * raw


@pytest.mark.slow
def test_run_with_stages_sends_the_same_bytes(tmp_path):
    """Compares one stage with two stages of twice the channels.

    Both send the same number of bytes, because the codebooks of two stages are twice as large and
    are sent half as often.
    """
    fields = {"codec__name": "vq", "codec__codes": 16, "train__steps": 20}
    bytes_per_image = {}
    for stages, dims in ((1, 2), (2, 4)):
        workdir = tmp_path / str(stages)
        summary = train_and_evaluate(
            small_config(
                **fields, codec__stages=stages, codec__dims=dims, codec__codebook_every=5 * stages
            ),
            workdir,
        )
        bytes_per_image[stages] = summary.wire_bytes_per_image
        assert all(0 < error < 1 for error in summary.codec_error)
        assert records(workdir)[-1]["step"] == 20
    assert bytes_per_image[1] == bytes_per_image[2]


@pytest.mark.slow
def test_changed_number_of_stages_is_refused(tmp_path):
    fields = {"codec__name": "vq", "codec__codes": 16, "codec__dims": 2, "train__steps": 2}
    train_and_evaluate(small_config(**fields), tmp_path)
    with pytest.raises(UserError, match=r"config\.codec\.stages \(was 1, is now 2\)"):
        train_and_evaluate(small_config(**fields, codec__stages=2), tmp_path)
