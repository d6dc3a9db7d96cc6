"""Vector quantisation alone: against NumPy, on streams that shift, with broken input, within its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgl_jax import UserError, system, vq
from dgl_jax.codecs import kmeans, relative_error, residual

KEY = jax.random.key(0)
_HOW = ("rule", "decay", "smoothing", "restart", "samples")
_START = ("stages", "codes", "dims", "start")
# Compiled: operation by operation they would be compiled anew at every call.
init, init_stages = (
    jax.jit(vq.init, static_argnames=_START[1:]),
    jax.jit(residual.init, static_argnames=_START),
)
encode, decode = jax.jit(vq.encode), jax.jit(vq.decode)
update, update_stages = (
    jax.jit(vq.update, static_argnames=_HOW),
    jax.jit(residual.update, static_argnames=_HOW),
)


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


@pytest.mark.slow
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
    sent = encode(entries, x)
    number = unpacked(sent, entries)
    assert number.shape == (*lead, groups)
    distances = oracle_distances(np.asarray(x, np.float32), entries)
    chosen = np.take_along_axis(distances, number[..., None], -1)[..., 0]
    np.testing.assert_array_less(chosen, distances.min(-1) * (1 + 1e-5) + 1e-12)
    expected = np.take_along_axis(
        entries[(None,) * len(lead)], number[..., None, None].reshape(*lead, groups, 1, 1), -2
    )
    np.testing.assert_array_equal(decode(entries, sent), expected.reshape(x.shape))


@pytest.mark.parametrize(
    ("codes", "dtype", "bytes_"),
    [(2, "uint8", 1), (4, "uint8", 2), (16, "uint8", 3), (17, "uint8", 6), (257, "uint16", 12)],
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
    found = kmeans._all_distances(jnp.asarray(x.T[None]), jnp.asarray(entries))
    assert found.ravel().tolist() == [0, 0, 5, 0]


SEARCHES = {
    "running": jax.jit(kmeans._running_minimum),
    "at once": jax.jit(kmeans._all_distances),
    "product": jax.jit(  # as it is usually written: the twin
        lambda v, e: jnp.argmin(
            jnp.square(e).sum(-1)[..., None] - 2 * jnp.einsum("gnd,gdb->gnb", e, v), axis=1
        )
    ),
}


def cloud(name):
    """Vectors [2, 8, 600] and entries [2, 64, 8] of the same kind."""
    random = np.random.default_rng(3)
    x = random.normal(size=(2, 664, 8))
    if name == "spread":  # thirty orders of magnitude, no two entries of one length
        x *= 10.0 ** random.integers(-15, 15, (2, 664, 1))
    elif name == "outliers":
        x = np.where(random.random((2, 664, 1)) < 0.02, 1e6 * x, x)
    elif name == "integers":  # many exact ties
        x = random.integers(-2, 3, x.shape)
    else:
        x = float(name) + 0.1 * x
    x = x.astype(np.float32)
    return jnp.asarray(x[:, 64:].transpose(0, 2, 1)), jnp.asarray(x[:, :64])


def nearness(vectors, entries, number):
    """Squared distance of the chosen entry over that of the nearest, less 1; and whether the two nearest are apart."""
    distances = oracle_distances(
        np.asarray(vectors).transpose(2, 0, 1).reshape(vectors.shape[2], -1), np.asarray(entries)
    )
    distances = distances.transpose(1, 0, 2)
    best, second = np.sort(distances, -1)[..., :2].transpose(2, 0, 1)
    chosen = np.take_along_axis(distances, np.asarray(number)[..., None], -1)[..., 0]
    return np.where(chosen > best, chosen / np.maximum(best, 1e-300) - 1, 0), second > best * (
        1 + 20 * 2.0**-24
    )


@pytest.mark.full_compile
@pytest.mark.parametrize("name", ["0", "100", "1e4", "spread", "outliers", "integers"])
def test_every_way_to_search_finds_the_nearest_whatever_the_mean(name):
    vectors, entries = cloud(name)
    found = {way: np.asarray(search(vectors, entries)) for way, search in SEARCHES.items()}
    for way in ("running", "at once"):
        excess, apart = nearness(vectors, entries, found[way])
        assert excess.max() < 20 * 2.0**-24
        assert not excess[apart].any()
    same = found["running"] == found["at once"]
    assert same[apart].all()
    if name == "integers":  # all is exact, and ties go to the lowest
        lowest = oracle_distances(
            np.asarray(vectors).transpose(0, 2, 1)[0], np.asarray(entries)[:1]
        ).argmin(-1)[:, 0]
        np.testing.assert_array_equal(found["at once"][0], lowest)
        assert same.all()
        assert not apart.all()
    if name in ("100", "1e4"):
        assert nearness(vectors, entries, found["product"])[0].max() > 1e-3


@pytest.mark.full_compile
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_codes_do_not_depend_on_the_backend(mean, monkeypatch, traced_anew):
    """Two stages through both branches of `platform_dependent`."""
    x = jnp.asarray(mean + 0.1 * normal((4, 30, 8)))
    entries = jnp.stack(
        [x[0, :16].reshape(16, 2, 4).transpose(1, 0, 2), jnp.asarray(0.1 * normal((2, 16, 4), 1))]
    )
    here = vq.encode(entries, x)
    taken = []
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cpu, default: taken.append(1) or default(*args)
    )
    np.testing.assert_array_equal(vq.encode(entries, x), here)
    assert taken


@pytest.mark.full_compile
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 4096, 4), (5000, 4), (4,)])
def test_chunks_change_nothing(shape, monkeypatch):
    x, entries = normal(shape), normal((2, 9, 2))
    whole = np.asarray(vq.encode(entries, x))
    monkeypatch.setattr(kmeans, "_CACHED", 24)
    np.testing.assert_array_equal(vq.encode(entries, x), whole)
    vq_rows = vq.rows_of(jnp.asarray(x))
    by_product = kmeans._chunked(
        vq_rows, jnp.asarray(entries)[None], max(1, vq_rows.shape[1] // 3), kmeans._all_distances
    )
    np.testing.assert_array_equal(by_product.reshape(*shape[:-1], 2), unpacked(whole, entries))


def test_a_codebook_of_all_vectors_is_the_identity():
    random = np.random.default_rng(0)
    x = random.integers(-20, 20, (4, 3, 3, 4)).astype(np.float32)
    entries = x.reshape(-1, 2, 2).transpose(1, 0, 2)  # every vector of the batch
    np.testing.assert_array_equal(vq.decode(entries, vq.encode(entries, x)), x)
    for group in range(2):  # and without one of them it is not
        missing = np.where(
            (entries[group] == x[2, 1, 1, 2 * group : 2 * group + 2]).all(-1)[:, None],
            99.0,
            entries[group],
        )
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
    return float(relative_error(x, decode(book.entries, encode(book.entries, x))))


CENTRES = 3 * normal((12, 4), seed=5)


def test_one_update_by_hand():
    book = vq.Codebook(
        entries=jnp.asarray([[[0.0], [10.0]]]),
        counts=jnp.asarray([[0.5, 0.5]]),
        sums=jnp.asarray([[[0.0], [5.0]]]),
        seen=jnp.asarray([[2.0, 2.0]]),
    )
    x = jnp.asarray(
        [[1.0], [3.0], [2.0], [6.0]]
    )  # three nearest to 0, one to 10: shares 3/4 and 1/4
    new, health = update(book, KEY, x, decay=0.8, smoothing=0.0, restart=0.0, samples=0)
    np.testing.assert_allclose(new.counts, [[0.55, 0.45]], rtol=1e-6)
    np.testing.assert_allclose(new.sums, [[[0.2 * 6 / 4], [0.8 * 5 + 0.2 * 6 / 4]]], rtol=1e-6)
    np.testing.assert_allclose(new.entries, [[[0.3 / 0.55], [4.3 / 0.45]]], rtol=1e-6)
    assert float(health["skipped"]) == 0
    np.testing.assert_allclose(
        health["perplexity"], np.exp(-(0.55 * np.log(0.55) + 0.45 * np.log(0.45))), rtol=1e-6
    )
    small, _ = update(book, KEY, x, rule="minibatch", restart=0.0, samples=0)
    np.testing.assert_allclose(
        small.entries, [[[6 / 5], [(20 + 6) / 3]]], rtol=1e-6
    )  # means of all that was seen
    np.testing.assert_allclose(small.seen, [[5, 3]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ema", "minibatch"])
@pytest.mark.parametrize("start", ["kmeans++", "sample"])
def test_it_finds_the_centres_of_a_stream(rule, start):
    book = init(KEY, mixture(0, CENTRES), codes=16, dims=4, start=start)
    for n in range(60):
        book, _ = update(
            book, jax.random.fold_in(KEY, n), mixture(n, CENTRES), rule=rule, samples=0
        )
    # What is left is the noise around each centre: 0.05 of a norm of 3 a value.
    assert error(book, mixture(999, CENTRES)) < 0.025


@pytest.mark.slow
def test_a_stream_that_shifts_is_followed_and_no_code_stays_dead():
    book = init(KEY, jnp.asarray(normal((64, 32, 8))), codes=64, dims=4)

    def train(book, scale, offset, updates):
        for n in range(updates):
            book, health = update(
                book,
                jax.random.fold_in(KEY, n),
                jnp.asarray(scale * normal((64, 32, 8), n) + offset),
            )
        return book, health

    book, _ = train(book, 1.0, 0.0, 80)
    settled = error(book, jnp.asarray(normal((64, 32, 8), 777)))
    far = jnp.asarray(0.5 * normal((64, 32, 8), 777) + 20.0)
    spread = float(
        jnp.linalg.norm(far) / jnp.linalg.norm(far - 20.0)
    )  # errors relative to the spread, not to the offset
    lost = spread * error(book, far)
    assert lost > 10 * settled
    book, health = train(book, 0.5, 20.0, 100)
    assert spread * error(book, far) < 1.1 * settled
    assert float(health["dead"]) <= 0.01


@pytest.mark.slow
def test_twin_without_restarts_codes_stay_dead():
    book = init(KEY, jnp.asarray(normal((64, 32, 8))), codes=64, dims=4)
    for n in range(100):
        book, health = update(
            book,
            jax.random.fold_in(KEY, n),
            jnp.asarray(0.5 * normal((64, 32, 8), n) + 20.0),
            decay=0.9,
            restart=0.0,
        )
    assert float(health["dead"]) > 0.5


@pytest.mark.slow
def test_a_restarted_code_begins_anew():
    x = jnp.asarray(normal((64, 8, 2)))
    book = init(KEY, x, codes=8, dims=2)
    far = book.replace(
        entries=book.entries.at[0, 3].set(1e6),
        counts=book.counts.at[0, 3].set(0.0),
        sums=book.sums.at[0, 3].set(0.0),
    )
    new, health = update(far, KEY, x)
    np.testing.assert_allclose(health["dead"], 1 / 8)
    vectors = np.asarray(x).reshape(-1, 2)
    assert (vectors == np.asarray(new.entries[0, 3])).all(-1).any()  # one of the batch
    np.testing.assert_allclose(new.counts[0, 3], 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(new.sums[0, 3], new.entries[0, 3] / 8, rtol=1e-6)


# What is reported


def two_values(n):
    """[8, 32, 8]; the two are no sums of few powers of two, so that sums of them are rounded."""
    return jnp.where(
        jax.random.bernoulli(jax.random.fold_in(KEY, n), 0.5, (8, 32, 1)), 0.1, -0.7
    ) * jnp.ones(8, jnp.float32)


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize("rule", ["ema", "minibatch"])
def test_health_of_one_value_and_of_two(rule):
    """The right numbers at every update, in one stage and in two, of which the second has nothing left to code."""
    start, of_stages = (
        partial(init, codes=16, dims=4),
        partial(init_stages, stages=2, codes=16, dims=4),
    )
    for batch, perplexity, dead in (
        (lambda n: jnp.full((8, 32, 8), 0.1, jnp.float32), 1.0, 15 / 16),
        (two_values, 2.0, 14 / 16),
    ):
        book, books = start(KEY, batch(0)), of_stages(KEY, batch(0))
        entries = book.entries
        for n in range(30):
            key = jax.random.fold_in(KEY, n)
            x, how = batch(n), {"rule": rule}
            (book, health), (books, mean) = (
                update(book, key, x, **how),
                update_stages(books, key, x, **how),
            )
            assert 0.99 * perplexity < health["perplexity"] <= perplexity
            assert health["dead"] == dead
            np.testing.assert_allclose(book.counts.sum(-1), 1.0, rtol=1e-6)
            np.testing.assert_allclose(
                mean["perplexity"], (health["perplexity"] + 1.0) / 2, rtol=1e-6
            )
            np.testing.assert_allclose(mean["dead"], (dead + 15 / 16) / 2)
        np.testing.assert_array_equal(book.entries, entries)  # not moved by a bit


@pytest.mark.slow
@pytest.mark.full_compile
def test_rounding_restarts_nothing(monkeypatch):
    """Entries one unit in the last place from the only two values there are, and fourteen that are dead."""
    x = 1000.0 + two_values(0)
    values = np.nextafter(np.float32([1000.1, 999.3]), np.float32(2000.0))
    entries = jnp.asarray(np.r_[values, np.full(14, 5.0)], jnp.float32)[None, :, None] * jnp.ones(
        (2, 1, 4), jnp.float32
    )
    counts = jnp.zeros((2, 16), jnp.float32).at[:, :2].set(0.5)
    book = vq.Codebook(entries, counts, counts[..., None] * entries, counts)
    np.testing.assert_array_equal(update(book, KEY, x)[0].entries[:, 2:], entries[:, 2:])
    far = update(book, KEY, jnp.concatenate([x, x + 0.01]))[0].entries[:, 2:]  # far beyond rounding
    assert (far != 5.0).any()
    monkeypatch.setattr(kmeans, "ROUNDING", 0.0)
    monkeypatch.setattr(vq, "ROUNDING", 0.0)
    assert (jax.jit(lambda *how: vq.update(*how))(book, KEY, x)[0].entries[:, 2:] != 5.0).any()


def entropy(counts):
    return -(counts * np.log(np.maximum(counts, 1e-30))).sum(-1)


class Count:
    """Keeps the counts of one stage in NumPy: a moving average, of which a restarted entry takes 1 / N from the others."""

    def __init__(self, book):
        self.counts, self.restarts = np.float64(book.counts), 0

    def update(self, old, new, x, rule):
        number = oracle_distances(x, np.asarray(old.entries)).argmin(-1)
        groups, codes, dims = old.entries.shape
        share = (
            np.stack([np.bincount(number[..., g].ravel(), minlength=codes) for g in range(groups)])
            / number[..., 0].size
        )
        self.counts += 0.1 * (share - self.counts)
        dead = self.counts < 0.01 / codes
        found = np.exp(entropy(self.counts)).mean(), dead.mean()
        vectors = x.reshape(-1, groups, dims)
        for g in range(groups):  # a vector of the batch, to the bit, is where an entry began anew
            at_vector = (np.asarray(new.entries)[g, :, None] == vectors[None, :, g]).all(-1).any(-1)
            restarted = (
                dead[g]
                & at_vector
                & (np.asarray(new.entries) != np.asarray(old.entries))[g].any(-1)
            )
            kept = np.where(restarted, 0, self.counts[g])
            self.counts[g] = np.where(
                restarted, 1 / codes, kept / kept.sum() * (1 - restarted.mean())
            )
            self.restarts += restarted.sum()
        np.testing.assert_allclose(new.counts, self.counts, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(np.asarray(new.counts).sum(-1), 1.0, rtol=1e-5)
        return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ema", "minibatch"])
def test_health_equals_a_count_in_numpy(rule):
    """Two stages on a stream that jumps half way, so that entries die and begin anew."""
    step = partial(update_stages, rule=rule, samples=0)
    batch = lambda n: normal((8, 32, 8), n) + 10.0 * (n >= 3)  # noqa: E731
    books = partial(init_stages, stages=2, codes=16, dims=4)(KEY, batch(0))
    stage = lambda books, s: jax.tree.map(lambda leaf: leaf[s], books)  # noqa: E731
    counts = [Count(stage(books, s)) for s in range(2)]
    for n in range(40):
        x = batch(n)
        new, health = step(books, jax.random.fold_in(KEY, n), jnp.asarray(x))
        first = stage(books, 0).entries
        rest = x - np.asarray(decode(first, encode(first, x)))
        found = [
            counts[s].update(stage(books, s), stage(new, s), batch_, rule)
            for s, batch_ in enumerate((x, rest))
        ]
        np.testing.assert_allclose(
            (health["perplexity"], health["dead"]), np.mean(found, 0), rtol=1e-4
        )
        books = new
    assert counts[0].restarts > 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_vectors_are_skipped_and_counted(bad):
    clean = normal((8, 16, 8))
    x = clean.copy()
    x[2, 3, 1] = x[5, 7, 6] = bad  # one vector of each group
    for start in ("kmeans++", "sample"):
        assert bool(
            jnp.isfinite(init(KEY, jnp.asarray(x), codes=16, dims=4, start=start).entries).all()
        )
    book = init(KEY, jnp.asarray(clean), codes=16, dims=4)
    new, health = update(book, KEY, jnp.asarray(x), samples=0, restart=0.0)
    assert float(health["skipped"]) == 2
    # As if these two vectors did not exist.
    number = oracle_distances(clean, np.asarray(book.entries)).argmin(-1)
    keep = np.ones((8, 16, 2), bool)
    keep[2, 3, 0] = keep[5, 7, 1] = False
    for group in range(2):
        share = np.bincount(number[..., group][keep[..., group]], minlength=16) / 127
        np.testing.assert_allclose(
            new.counts[group], 0.9 * book.counts[group] + 0.1 * share, rtol=1e-5
        )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new))
    nothing, health = update(book, KEY, jnp.full((8, 16, 8), bad, jnp.float32))
    assert float(health["skipped"]) == 8 * 16 * 2
    for a, b in zip(jax.tree.leaves(nothing), jax.tree.leaves(book)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("start", ["kmeans++", "sample"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_start_from_few_vectors_takes_finite_ones_only(start, dtype):
    """Six vectors of which a group has five, sixteen codes: each vector at least once, and nothing else."""
    x = jnp.asarray(1.0 + 0.1 * normal((6, 8)), dtype)
    x = x.at[2, 1].set(jnp.nan).at[5, 6].set(jnp.inf)
    make = partial(init, codes=16, dims=4, start=start)
    of_stages = partial(init_stages, stages=2, codes=16, dims=4, start=start)(KEY, x)
    for seed in range(3):
        entries = np.asarray(make(jax.random.fold_in(KEY, seed), x).entries)
        for group, broken in ((0, 2), (1, 5)):
            good = np.delete(
                np.asarray(x, np.float32)[:, 4 * group : 4 * group + 4], broken, axis=0
            )
            chosen = {row.tobytes() for row in entries[group]}
            assert chosen <= {row.tobytes() for row in good}
            assert start == "sample" or len(chosen) == 5
    assert not np.asarray(of_stages.entries[1]).any()  # nothing is left over
    assert np.isfinite(np.asarray(of_stages.entries)).all()


def test_a_start_whose_pool_is_broken_takes_the_first_finite_vector_and_without_one_zeros():
    x = np.full((1, 400, 4), np.nan, np.float32)
    x[0, 399] = [1, 2, 3, 4]
    make = partial(init, codes=2, dims=4)  # of a pool of eight
    np.testing.assert_array_equal(make(KEY, jnp.asarray(x)).entries, [[[1, 2, 3, 4]] * 2])
    book = make(KEY, jnp.full((1, 400, 4), np.inf, jnp.float32))
    np.testing.assert_array_equal(book.entries, np.zeros((1, 2, 4)))
    assert not book.counts.any()
    # It recovers with the first vectors that are finite, and its counts are a distribution at once.
    new, health = update(book, KEY, jnp.asarray(normal((1, 400, 4))))
    assert new.entries[0, 1].any()
    np.testing.assert_allclose(new.counts.sum(-1), 1.0, rtol=1e-6)
    assert (float(health["perplexity"]), float(health["dead"])) == (1.0, 0.5)


def test_a_pick_never_has_weight_0(monkeypatch):
    weights = np.zeros((3, 1000), np.float32)
    weights[0, 10:20] = np.random.default_rng(0).random(10) * 1e-3
    weights[1, [5, 700]] = np.inf, 1.0
    for uniform in (jnp.zeros, jnp.ones, lambda shape, dtype: jnp.full(shape, 1 - 2.0**-24, dtype)):
        monkeypatch.setattr(
            jax.random, "uniform", lambda key, shape, dtype, uniform=uniform: uniform(shape, dtype)
        )
        found = np.asarray(kmeans._pick(KEY, jnp.asarray(weights), 4))
        assert (weights[np.arange(2)[:, None], found[:2]] > 0).all()
        assert not found[2].any()


@pytest.mark.slow
@pytest.mark.full_compile
def test_functions_compile_once_and_give_the_same_bits():
    x = jnp.asarray(normal((4, 6, 6, 8)))
    book = init(KEY, x, codes=16, dims=4)
    compiled = jax.jit(lambda book, key, x: vq.update(book, key, x))  # with a cache of its own
    (a, _), (b, _) = compiled(book, KEY, x), vq.update(book, KEY, x)
    np.testing.assert_allclose(
        a.entries, b.entries, rtol=1e-6, atol=1e-7
    )  # entries near 0 are sums of larger values
    compiled(a, KEY, x + 1)
    assert compiled._cache_size() == 1
    np.testing.assert_array_equal(jax.jit(vq.encode)(book.entries, x), vq.encode(book.entries, x))


@pytest.mark.slow
def test_sums_go_over_a_whole_device_group(devices):
    """A batch cut over devices gives the codebook that one device gives, the same on every device."""
    mesh = jax.make_mesh(
        (4,), ("batch",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,)
    )
    split = jax.NamedSharding(mesh, jax.P("batch"))
    x = jnp.asarray(normal((8, 5, 5, 8)))
    book = init(KEY, x, codes=16, dims=4)
    alone, _ = jax.jit(vq.update)(book, KEY, x)
    everywhere = jax.NamedSharding(mesh, jax.P())
    together, _ = jax.jit(vq.update, out_shardings=everywhere)(
        jax.device_put(book, everywhere), KEY, jax.device_put(x, split)
    )
    np.testing.assert_allclose(together.entries, alone.entries, rtol=1e-5, atol=1e-7)
    copies = [np.asarray(shard.data) for shard in together.entries.addressable_shards]
    assert len(copies) == 4
    assert all(np.array_equal(copies[0], other) for other in copies)
    codes = jax.jit(vq.encode)(jax.device_put(book.entries, everywhere), jax.device_put(x, split))
    assert codes.sharding.is_equivalent_to(split, codes.ndim)
    np.testing.assert_array_equal(codes, vq.encode(book.entries, x))


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "codes", "dims"),
    [((128, 32, 32, 16), 256, 8), ((128, 8, 8, 64), 256, 8), ((128, 16, 16, 32), 16, 4)],
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
        vectors = kmeans._vectors(kmeans.rows_of(x), dims)
        return jnp.argmin(jnp.einsum("gnd,gdb->gnb", entries, vectors), axis=1)

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
        init(KEY, jnp.ones((2, 8)), codes=codes, dims=dims)
