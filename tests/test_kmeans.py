"""Tests of learning in vector quantization: updates, metrics, broken input, and initialization."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_vq import KEY, decode, encode, init, normal, oracle_distances

from dgl_jax import vq
from dgl_jax.codecs import draws, kmeans, relative_error, residual

_HOW = ("rule", "decay", "smoothing", "restart", "samples")
# Jitted, because unjitted calls compile each operation again every time.
init_stages = jax.jit(residual.init, static_argnames=("stages", "codes", "dims", "start"))
update, update_stages = (
    jax.jit(vq.update, static_argnames=_HOW),
    jax.jit(residual.update, static_argnames=_HOW),
)


def mixture(seed, centers, size=(16, 32), shift=0.0):
    """Returns noisy vectors around the centers [n, C]."""
    random = np.random.default_rng(seed)
    picked = centers[random.integers(0, len(centers), size)] + shift
    return jnp.asarray(picked + 0.05 * random.normal(size=picked.shape), jnp.float32)


def error(book, x):
    return float(relative_error(x, decode(book.entries, encode(book.entries, x))))


CENTERS = 3 * normal((12, 4), seed=5)


def test_one_update_matches_hand_computed_values():
    book = vq.Codebook(
        entries=jnp.asarray([[[0.0], [10.0]]]),
        counts=jnp.asarray([[0.5, 0.5]]),
        sums=jnp.asarray([[[0.0], [5.0]]]),
        seen=jnp.asarray([[2.0, 2.0]]),
    )
    # Three vectors are nearest to 0 and one to 10: shares 3/4 and 1/4.
    x = jnp.asarray([[1.0], [3.0], [2.0], [6.0]])
    new, health = update(book, KEY, x, decay=0.8, smoothing=0.0, restart=0.0, samples=0)
    np.testing.assert_allclose(new.counts, [[0.55, 0.45]], rtol=1e-6)
    np.testing.assert_allclose(new.sums, [[[0.2 * 6 / 4], [0.8 * 5 + 0.2 * 6 / 4]]], rtol=1e-6)
    np.testing.assert_allclose(new.entries, [[[0.3 / 0.55], [4.3 / 0.45]]], rtol=1e-6)
    assert float(health["skipped"]) == 0
    np.testing.assert_allclose(
        health["perplexity"], np.exp(-(0.55 * np.log(0.55) + 0.45 * np.log(0.45))), rtol=1e-6
    )
    small, _ = update(book, KEY, x, rule="minibatch", restart=0.0, samples=0)
    # Entries are the means of all vectors seen.
    np.testing.assert_allclose(small.entries, [[[6 / 5], [(20 + 6) / 3]]], rtol=1e-6)
    np.testing.assert_allclose(small.seen, [[5, 3]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ema", "minibatch"])
@pytest.mark.parametrize("start", ["kmeans++", "sample"])
def test_codebook_learns_the_centers_of_a_stream(rule, start):
    book = init(KEY, mixture(0, CENTERS), codes=16, dims=4, start=start)
    for n in range(60):
        book, _ = update(
            book, jax.random.fold_in(KEY, n), mixture(n, CENTERS), rule=rule, samples=0
        )
    # The remaining error is the noise around each center: 0.05 of a norm of 3 per value.
    assert error(book, mixture(999, CENTERS)) < 0.025


@pytest.mark.slow
def test_codebook_follows_a_shifting_stream_without_dead_codes():
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
    # Makes errors relative to the spread of the data instead of the offset.
    spread = float(jnp.linalg.norm(far) / jnp.linalg.norm(far - 20.0))
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
def test_restarted_code_starts_with_the_mean_count():
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
    assert (vectors == np.asarray(new.entries[0, 3])).all(-1).any()  # a vector of the batch
    np.testing.assert_allclose(new.counts[0, 3], 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(new.sums[0, 3], new.entries[0, 3] / 8, rtol=1e-6)


def two_values(n):
    """Returns [8, 32, 8] activations with two distinct values, each in half of the examples.

    Which half is random at every position. Neither value is a sum of few powers of two, so sums of
    them are rounded.
    """
    halves = jnp.arange(8)[:, None, None] % 2 == 0
    flips = jax.random.bernoulli(jax.random.fold_in(KEY, n), 0.5, (1, 32, 1))
    return jnp.where(halves ^ flips, 0.1, -0.7) * jnp.ones(8, jnp.float32)


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize("rule", ["ema", "minibatch"])
def test_health_is_exact_for_one_value_and_two(rule):
    """Checks the metrics at every update, in one stage and in two.

    The second stage has nothing left to encode.
    """
    start, start_stages = (
        partial(init, codes=16, dims=4),
        partial(init_stages, stages=2, codes=16, dims=4),
    )
    for batch, perplexity, dead in (
        (lambda n: jnp.full((8, 32, 8), 0.1, jnp.float32), 1.0, 15 / 16),
        (two_values, 2.0, 14 / 16),
    ):
        book, books = start(KEY, batch(0)), start_stages(KEY, batch(0))
        entries = book.entries
        for n in range(30):
            key = jax.random.fold_in(KEY, n)
            x, options = batch(n), {"rule": rule}
            (book, health), (books, mean) = (
                update(book, key, x, **options),
                update_stages(books, key, x, **options),
            )
            assert 0.99 * perplexity < health["perplexity"] <= perplexity
            assert health["dead"] == dead
            np.testing.assert_allclose(book.counts.sum(-1), 1.0, rtol=1e-6)
            np.testing.assert_allclose(
                mean["perplexity"], (health["perplexity"] + 1.0) / 2, rtol=1e-6
            )
            np.testing.assert_allclose(mean["dead"], (dead + 15 / 16) / 2)
        np.testing.assert_array_equal(book.entries, entries)  # unchanged, bit for bit


@pytest.mark.slow
@pytest.mark.full_compile
def test_rounding_errors_restart_no_entry(monkeypatch):
    """Starts with entries one unit in the last place from the data's only two values.

    The other fourteen entries are dead.
    """
    x = 1000.0 + two_values(0)
    values = np.nextafter(np.float32([1000.1, 999.3]), np.float32(2000.0))
    entries = jnp.asarray(np.r_[values, np.full(14, 5.0)], jnp.float32)[None, :, None] * jnp.ones(
        (2, 1, 4), jnp.float32
    )
    counts = jnp.zeros((2, 16), jnp.float32).at[:, :2].set(0.5)
    book = vq.Codebook(entries, counts, counts[..., None] * entries, counts)
    np.testing.assert_array_equal(update(book, KEY, x)[0].entries[:, 2:], entries[:, 2:])
    far = update(book, KEY, jnp.concatenate([x, x + 0.01]))[0].entries[
        :, 2:
    ]  # twin: beyond rounding
    assert (far != 5.0).any()
    monkeypatch.setattr(kmeans, "ROUNDING", 0.0)
    monkeypatch.setattr(vq, "ROUNDING", 0.0)
    assert (
        jax.jit(lambda *arguments: vq.update(*arguments))(book, KEY, x)[0].entries[:, 2:] != 5.0
    ).any()


def entropy(counts):
    return -(counts * np.log(np.maximum(counts, 1e-30))).sum(-1)


class Count:
    """Counts the vectors of one stage's entries in NumPy.

    The counts are a moving average, and a restarted entry takes 1 / N from the others.
    """

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
        metrics = np.exp(entropy(self.counts)).mean(), dead.mean()
        vectors = x.reshape(-1, groups, dims)
        for g in range(groups):  # an entry that equals a vector of the batch was restarted
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
        return metrics


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ema", "minibatch"])
def test_health_equals_numpy_count(rule):
    """Runs two stages on a stream that jumps, so that entries die and are restarted."""
    step = partial(update_stages, rule=rule, samples=0)

    def batch(n):
        return normal((8, 32, 8), n) + 10.0 * (n >= 3)

    def stage(books, s):
        return jax.tree.map(lambda leaf: leaf[s], books)

    books = partial(init_stages, stages=2, codes=16, dims=4)(KEY, batch(0))
    counts = [Count(stage(books, s)) for s in range(2)]
    for n in range(40):
        x = batch(n)
        new, health = step(books, jax.random.fold_in(KEY, n), jnp.asarray(x))
        first = stage(books, 0).entries
        rest = x - np.asarray(decode(first, encode(first, x)))
        expected = [
            counts[s].update(stage(books, s), stage(new, s), batch_, rule)
            for s, batch_ in enumerate((x, rest))
        ]
        np.testing.assert_allclose(
            (health["perplexity"], health["dead"]), np.mean(expected, 0), rtol=1e-4
        )
        books = new
    assert counts[0].restarts > 5


@pytest.mark.medium
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_vectors_are_skipped_and_counted(bad):
    clean = normal((8, 16, 8))
    x = clean.copy()
    x[2, 3, 1] = x[5, 7, 6] = bad  # one vector per group
    for start in ("kmeans++", "sample"):
        assert bool(
            jnp.isfinite(init(KEY, jnp.asarray(x), codes=16, dims=4, start=start).entries).all()
        )
    book = init(KEY, jnp.asarray(clean), codes=16, dims=4)
    new, health = update(book, KEY, jnp.asarray(x), samples=0, restart=0.0)
    assert float(health["skipped"]) == 2
    # The result is as if these two vectors did not exist.
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


@pytest.mark.medium
@pytest.mark.parametrize("start", ["kmeans++", "sample"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_init_from_few_vectors_takes_finite_ones_only(start, dtype):
    """Initializes sixteen codes from six vectors, of which each group has five finite ones.

    With k-means++ each finite vector is chosen at least once.
    """
    x = jnp.asarray(1.0 + 0.1 * normal((6, 8)), dtype)
    x = x.at[2, 1].set(jnp.nan).at[5, 6].set(jnp.inf)
    make = partial(init, codes=16, dims=4, start=start)
    staged = partial(init_stages, stages=2, codes=16, dims=4, start=start)(KEY, x)
    for seed in range(3):
        entries = np.asarray(make(jax.random.fold_in(KEY, seed), x).entries)
        for group, broken in ((0, 2), (1, 5)):
            good = np.delete(
                np.asarray(x, np.float32)[:, 4 * group : 4 * group + 4], broken, axis=0
            )
            chosen = {row.tobytes() for row in entries[group]}
            assert chosen <= {row.tobytes() for row in good}
            assert start == "sample" or len(chosen) == 5
    assert not np.asarray(staged.entries[1]).any()  # the first stage leaves no residual
    assert np.isfinite(np.asarray(staged.entries)).all()


@pytest.mark.medium
def test_init_without_finite_pool_takes_first_finite_vector_or_zeros():
    x = np.full((1, 400, 4), np.nan, np.float32)
    x[0, 399] = [1, 2, 3, 4]
    make = partial(init, codes=2, dims=4)  # draws from a pool of eight vectors
    np.testing.assert_array_equal(make(KEY, jnp.asarray(x)).entries, [[[1, 2, 3, 4]] * 2])
    book = make(KEY, jnp.full((1, 400, 4), np.inf, jnp.float32))
    np.testing.assert_array_equal(book.entries, np.zeros((1, 2, 4)))
    assert not book.counts.any()
    # The first finite vectors repair the codebook, and its counts sum to 1 at once.
    new, health = update(book, KEY, jnp.asarray(normal((1, 400, 4))))
    assert new.entries[0, 1].any()
    np.testing.assert_allclose(new.counts.sum(-1), 1.0, rtol=1e-6)
    assert (float(health["perplexity"]), float(health["dead"])) == (1.0, 0.5)


def test_pick_never_draws_weight_0(monkeypatch):
    weights = np.zeros((3, 1000), np.float32)
    weights[0, 10:20] = np.random.default_rng(0).random(10) * 1e-3
    weights[1, [5, 700]] = np.inf, 1.0
    for uniform in (jnp.zeros, jnp.ones, lambda shape, dtype: jnp.full(shape, 1 - 2.0**-24, dtype)):
        monkeypatch.setattr(
            jax.random, "uniform", lambda key, shape, dtype, uniform=uniform: uniform(shape, dtype)
        )
        picked = np.asarray(kmeans._pick(KEY, jnp.asarray(weights), 4))
        assert (weights[np.arange(2)[:, None], picked[:2]] > 0).all()
        assert not picked[2].any()


# Draws


def test_large_batches_give_one_vector_for_several_examples():
    rows = np.arange(4096 * 3, dtype=np.float32).reshape(4096, 3, 1)
    drawn = np.asarray(draws.draw(KEY, jnp.asarray(rows), 10)).ravel()
    # 1,024 vectors are drawn at least: every fourth example, all at the same position.
    assert drawn.tolist() == (rows[::4, int(drawn[0]) % 3]).ravel().tolist()
    assert draws.draw(KEY, jnp.asarray(rows), 2048).shape == (2048, 1, 1)
    assert draws.draw(KEY, jnp.asarray(rows[:3000]), 10).shape == (1500, 1, 1)
    assert draws.draw(KEY, jnp.asarray(rows[:2049]), 10).shape == (2049, 1, 1)  # 2049 = 3 x 683
    assert draws.draw(KEY, jnp.asarray(rows[:128]), 10).shape == (128, 1, 1)
    assert draws.draw(KEY, jnp.asarray(rows[:128]), 200).shape == (128, 2, 1)
    assert draws.draw(KEY, jnp.asarray(rows[:128]), 0).shape == (128, 3, 1)


@pytest.mark.parametrize(("kind", "copied"), [("Auto", True), ("Explicit", False)])
def test_draws_are_copied_in_a_group_alone(kind, copied):
    rows = jnp.zeros((8, 3, 1))

    def copies(whole=False):
        traced = jax.make_jaxpr(lambda x: draws.draw(KEY, x, 4, whole))(rows)
        return "sharding_constraint" in str(traced)

    assert not copies()
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("batch",), (AxisType[kind],))):
        assert copies() == copied
        assert not copies(whole=True)
