"""Vector quantisation alone: against NumPy, on streams that shift, with broken input, within its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgl_jax import UserError, system, vq
from dgl_jax.codecs import relative_error

KEY = jax.random.key(0)


def oracle_distances(x: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Squared distances [..., G, N] in float64."""
    groups, _, dims = entries.shape
    vectors = x.astype(np.float64).reshape(*x.shape[:-1], groups, 1, dims)
    return np.square(vectors - entries.astype(np.float64)).sum(-1)


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def unpacked(codes, entries):
    """The numbers themselves."""
    return np.asarray(vq._unpack(codes, entries.shape[1], entries.shape[0]))


# Encoding and decoding


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    groups=st.integers(1, 5),
    dims=st.integers(1, 6),
    codes=st.sampled_from([1, 2, 3, 4, 7, 16, 17, 40, 256, 300]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_encode_finds_the_nearest_entry(lead, groups, dims, codes, half, seed):
    x = jnp.asarray(normal((*lead, groups * dims), seed), jnp.bfloat16 if half else jnp.float32)
    entries = normal((groups, codes, dims), seed + 100)
    sent = vq.encode(entries, x)
    number = unpacked(sent, entries)
    assert number.shape == (*lead, groups)
    distances = oracle_distances(np.asarray(x, np.float32), entries)
    chosen = np.take_along_axis(distances, number[..., None], -1)[..., 0]
    np.testing.assert_array_less(chosen, distances.min(-1) * (1 + 1e-5) + 1e-12)
    expected = np.take_along_axis(entries[(None,) * len(lead)], number[..., None, None].reshape(*lead, groups, 1, 1), -2)
    np.testing.assert_array_equal(vq.decode(entries, sent), expected.reshape(x.shape))


@pytest.mark.parametrize(
    ("codes", "dtype", "bytes_"), [(2, "uint8", 1), (4, "uint8", 2), (16, "uint8", 3), (17, "uint8", 6), (257, "uint16", 12)]
)
def test_codes_take_no_more_than_their_bits(codes, dtype, bytes_):
    x, entries = normal((3, 4, 12)), normal((6, codes, 2))
    sent = vq.encode(entries, x)
    assert sent.dtype == dtype
    assert sent.nbytes == bytes_ * 3 * 4  # six groups a position
    np.testing.assert_array_equal(unpacked(sent, entries), oracle_distances(x, entries).argmin(-1))


def test_ties_go_to_the_lowest_number():
    entries = np.zeros((1, 20, 2), np.float32)
    entries[0, 5:] = [1, 0]
    entries[0, 7] = [-1, 0]
    # As near to 0 as to 5 and 7; to 5 and those like it; to 7.
    x = np.array([[0, 0], [0.5, 3], [0.75, 0], [-0.5, 1]], np.float32)
    assert unpacked(vq.encode(entries, x), entries).ravel().tolist() == [0, 0, 5, 0]
    distances = vq._product(jnp.asarray(x.T[None]), jnp.asarray(entries))
    assert distances.ravel().tolist() == [0, 0, 5, 0]


def test_both_ways_to_search_agree_on_integers():
    random = np.random.default_rng(1)
    vectors = jnp.asarray(random.integers(-8, 9, (3, 4, 500)).astype(np.float32))
    entries = jnp.asarray(random.integers(-8, 9, (3, 37, 4)).astype(np.float32))
    np.testing.assert_array_equal(vq._product(vectors, entries), vq._running_minimum(vectors, entries))


@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 4096, 4), (5000, 4), (4,)])
def test_chunks_change_nothing(shape, monkeypatch):
    x, entries = normal(shape), normal((2, 9, 2))
    whole = np.asarray(vq.encode(entries, x))
    monkeypatch.setattr(vq, "_CACHED", 24)
    np.testing.assert_array_equal(vq.encode(entries, x), whole)
    vq_rows = vq.rows_of(jnp.asarray(x))
    by_product = vq._chunked(vq_rows, jnp.asarray(entries)[None], max(1, vq_rows.shape[1] // 3), vq._product)
    np.testing.assert_array_equal(by_product.reshape(*shape[:-1], 2), unpacked(whole, entries))


def test_a_codebook_of_all_vectors_is_the_identity():
    random = np.random.default_rng(0)
    x = random.integers(-20, 20, (4, 3, 3, 4)).astype(np.float32)
    entries = x.reshape(-1, 2, 2).transpose(1, 0, 2)  # every vector of the batch
    np.testing.assert_array_equal(vq.decode(entries, vq.encode(entries, x)), x)
    for group in range(2):  # and without one of them it is not
        missing = np.where((entries[group] == x[2, 1, 1, 2 * group : 2 * group + 2]).all(-1)[:, None], 99.0, entries[group])
        less = np.stack([missing if g == group else entries[g] for g in range(2)])
        assert not np.array_equal(vq.decode(less, vq.encode(less, x)), x)


def test_decode_gives_the_dtype_that_is_asked_for():
    entries = normal((2, 4, 3))
    codes = vq.encode(entries, normal((5, 6)))
    half = vq.decode(entries, codes, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, vq.decode(entries, codes).astype(jnp.bfloat16))


# Learning


def mixture(seed, centres, size=(16, 32), shift=0.0):
    """Vectors around the centres [n, C]."""
    random = np.random.default_rng(seed)
    picked = centres[random.integers(0, len(centres), size)] + shift
    return jnp.asarray(picked + 0.05 * random.normal(size=picked.shape), jnp.float32)


def error(book, x):
    return float(relative_error(x, vq.decode(book.entries, vq.encode(book.entries, x))))


CENTRES = 3 * normal((12, 4), seed=5)


def test_one_update_by_hand():
    book = vq.Codebook(
        entries=jnp.asarray([[[0.0], [10.0]]]),
        counts=jnp.asarray([[0.5, 0.5]]),
        sums=jnp.asarray([[[0.0], [5.0]]]),
        seen=jnp.asarray([[2.0, 2.0]]),
    )
    x = jnp.asarray([[1.0], [3.0], [2.0], [6.0]])  # three nearest to 0, one to 10: shares 3/4 and 1/4
    new, health = vq.update(book, KEY, x, decay=0.8, smoothing=0.0, restart=0.0, samples=0)
    np.testing.assert_allclose(new.counts, [[0.55, 0.45]], rtol=1e-6)
    np.testing.assert_allclose(new.sums, [[[0.2 * 6 / 4], [0.8 * 5 + 0.2 * 6 / 4]]], rtol=1e-6)
    np.testing.assert_allclose(new.entries, [[[0.3 / 0.55], [4.3 / 0.45]]], rtol=1e-6)
    assert float(health["skipped"]) == 0
    np.testing.assert_allclose(health["perplexity"], np.exp(-(0.55 * np.log(0.55) + 0.45 * np.log(0.45))), rtol=1e-6)
    small, _ = vq.update(book, KEY, x, rule="minibatch", restart=0.0, samples=0)
    np.testing.assert_allclose(small.entries, [[[6 / 5], [(20 + 6) / 3]]], rtol=1e-6)  # means of all that was seen
    np.testing.assert_allclose(small.seen, [[5, 3]], rtol=1e-6)


@pytest.mark.parametrize("rule", ["ema", "minibatch"])
@pytest.mark.parametrize("start", ["kmeans++", "sample"])
def test_it_finds_the_centres_of_a_stream(rule, start):
    update = jax.jit(lambda book, key, x: vq.update(book, key, x, rule=rule, samples=0)[0])
    book = vq.init(KEY, mixture(0, CENTRES), codes=16, dims=4, start=start)
    for n in range(60):
        book = update(book, jax.random.fold_in(KEY, n), mixture(n, CENTRES))
    # What is left is the noise around each centre: 0.05 of a norm of 3 a value.
    assert error(book, mixture(999, CENTRES)) < 0.025


def test_a_stream_that_shifts_is_followed_and_no_code_stays_dead():
    update = jax.jit(lambda book, key, x: vq.update(book, key, x, decay=0.9))
    book = vq.init(KEY, jnp.asarray(normal((64, 32, 8))), codes=64, dims=4)

    def train(book, scale, offset, updates):
        for n in range(updates):
            book, health = update(book, jax.random.fold_in(KEY, n), jnp.asarray(scale * normal((64, 32, 8), n) + offset))
        return book, health

    book, _ = train(book, 1.0, 0.0, 80)
    settled = error(book, jnp.asarray(normal((64, 32, 8), 777)))
    far = jnp.asarray(0.5 * normal((64, 32, 8), 777) + 20.0)
    spread = float(jnp.linalg.norm(far) / jnp.linalg.norm(far - 20.0))  # errors relative to the spread, not to the offset
    lost = spread * error(book, far)
    assert lost > 10 * settled
    book, health = train(book, 0.5, 20.0, 100)
    assert spread * error(book, far) < 1.1 * settled
    assert float(health["dead"]) <= 0.01


def test_twin_without_restarts_codes_stay_dead():
    book = vq.init(KEY, jnp.asarray(normal((64, 32, 8))), codes=64, dims=4)
    for n in range(100):
        book, health = vq.update(
            book, jax.random.fold_in(KEY, n), jnp.asarray(0.5 * normal((64, 32, 8), n) + 20.0), decay=0.9, restart=0.0
        )
    assert float(health["dead"]) > 0.5


def test_a_restarted_code_begins_anew():
    x = jnp.asarray(normal((64, 8, 2)))
    book = vq.init(KEY, x, codes=8, dims=2)
    far = book.replace(
        entries=book.entries.at[0, 3].set(1e6), counts=book.counts.at[0, 3].set(0.0), sums=book.sums.at[0, 3].set(0.0)
    )
    new, health = vq.update(far, KEY, x)
    np.testing.assert_allclose(health["dead"], 1 / 8)
    vectors = np.asarray(x).reshape(-1, 2)
    assert (vectors == np.asarray(new.entries[0, 3])).all(-1).any()  # one of the batch
    np.testing.assert_allclose(new.counts[0, 3], 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(new.sums[0, 3], new.entries[0, 3] / 8, rtol=1e-6)


def test_vectors_that_are_all_the_same_do_no_harm():
    x = jnp.full((4, 16, 6), 2.5)
    book = vq.init(KEY, x, codes=8, dims=3)
    for n in range(5):
        book, _ = vq.update(book, jax.random.fold_in(KEY, n), x)
    assert bool(jnp.isfinite(book.entries).all())
    np.testing.assert_allclose(vq.decode(book.entries, vq.encode(book.entries, x)), x, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_vectors_are_skipped_and_counted(bad):
    clean = normal((8, 16, 8))
    x = clean.copy()
    x[2, 3, 1] = x[5, 7, 6] = bad  # one vector of each group
    for start in ("kmeans++", "sample"):
        assert bool(jnp.isfinite(vq.init(KEY, jnp.asarray(x), codes=16, dims=4, start=start).entries).all())
    book = vq.init(KEY, jnp.asarray(clean), codes=16, dims=4)
    new, health = vq.update(book, KEY, jnp.asarray(x), samples=0, restart=0.0)
    assert float(health["skipped"]) == 2
    # As if these two vectors did not exist.
    number = oracle_distances(clean, np.asarray(book.entries)).argmin(-1)
    keep = np.ones((8, 16, 2), bool)
    keep[2, 3, 0] = keep[5, 7, 1] = False
    for group in range(2):
        share = np.bincount(number[..., group][keep[..., group]], minlength=16) / 127
        np.testing.assert_allclose(new.counts[group], 0.9 * book.counts[group] + 0.1 * share, rtol=1e-5)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new))
    nothing, health = vq.update(book, KEY, jnp.full((8, 16, 8), bad))
    assert float(health["skipped"]) == 8 * 16 * 2
    for a, b in zip(jax.tree.leaves(nothing), jax.tree.leaves(book)):
        np.testing.assert_array_equal(a, b)


def test_functions_compile_once_and_give_the_same_bits():
    x = jnp.asarray(normal((4, 6, 6, 8)))
    book = vq.init(KEY, x, codes=16, dims=4)
    compiled = jax.jit(vq.update)
    (a, _), (b, _) = compiled(book, KEY, x), vq.update(book, KEY, x)
    np.testing.assert_allclose(a.entries, b.entries, rtol=1e-6)
    compiled(a, KEY, x + 1)
    assert compiled._cache_size() == 1
    np.testing.assert_array_equal(jax.jit(vq.encode)(book.entries, x), vq.encode(book.entries, x))


def test_sums_go_over_a_whole_device_group(devices):
    """A batch cut over devices gives the codebook that one device gives, the same on every device."""
    mesh = jax.make_mesh((4,), ("batch",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("batch"))
    x = jnp.asarray(normal((8, 5, 5, 8)))
    book = vq.init(KEY, x, codes=16, dims=4)
    alone, _ = jax.jit(vq.update)(book, KEY, x)
    everywhere = jax.NamedSharding(mesh, jax.P())
    together, _ = jax.jit(vq.update, out_shardings=everywhere)(jax.device_put(book, everywhere), KEY, jax.device_put(x, split))
    np.testing.assert_allclose(together.entries, alone.entries, rtol=1e-5, atol=1e-7)
    copies = [np.asarray(shard.data) for shard in together.entries.addressable_shards]
    assert len(copies) == 4
    assert all(np.array_equal(copies[0], other) for other in copies)
    codes = jax.jit(vq.encode)(jax.device_put(book.entries, everywhere), jax.device_put(x, split))
    assert codes.sharding.is_equivalent_to(split, codes.ndim)
    np.testing.assert_array_equal(codes, vq.encode(book.entries, x))


@pytest.mark.parametrize(
    ("shape", "codes", "dims"), [((128, 32, 32, 16), 256, 8), ((128, 8, 8, 64), 256, 8), ((128, 16, 16, 32), 16, 4)]
)
def test_temporary_memory_stays_under_twice_the_packet(shape, codes, dims):
    x = jax.ShapeDtypeStruct(shape, "float32")
    book = jax.eval_shape(lambda key, x: vq.init(key, x, codes, dims), jax.random.key(0), x)
    raw = 4 * np.prod(shape)

    def temporary(function, *arguments):
        return system.program_plan(jax.jit(function).lower(*arguments).compile()).temporary / raw

    assert temporary(vq.encode, book.entries, x) < 2
    assert temporary(vq.update, book, KEY, x) < 2

    def at_once(entries, x):  # all distances at the same time
        return vq._product(vq._vectors(vq.rows_of(x), dims), entries)

    assert temporary(at_once, book.entries, x) > 2


@pytest.mark.parametrize(
    ("codes", "dims", "message"),
    [
        (0, 4, r"config\.codec\.codes=0: a codebook has from 1 to 65536"),
        (65537, 4, r"config\.codec\.codes=65537"),
        (16, 3, r"config\.codec\.dims=3: does not divide 8 channels; 1, 2, 4 would do"),
        (16, 0, r"config\.codec\.dims=0: does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(codes, dims, message):
    with pytest.raises(UserError, match=message):
        vq.init(KEY, jnp.ones((2, 8)), codes=codes, dims=dims)
