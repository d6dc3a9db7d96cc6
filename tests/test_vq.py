"""Tests of encoding and decoding in vector quantization, against NumPy and in bounded memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgl_jax import UserError, system, vq
from dgl_jax.codecs import kmeans
from dgl_jax.engines.program import on_group

KEY = jax.random.key(0)
# Jitted, because unjitted calls compile each operation again every time.
init = jax.jit(vq.init, static_argnames=("codes", "dims", "start"))
encode, decode = jax.jit(vq.encode), jax.jit(vq.decode)


def oracle_distances(x: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Returns squared distances [..., G, N] in float64."""
    groups, _, dims = entries.shape
    vectors = x.astype(np.float64).reshape(*x.shape[:-1], groups, 1, dims)
    return np.square(vectors - entries.astype(np.float64)).sum(-1)


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def unpacked(codes, entries):
    """Returns the entry numbers of packed codes."""
    return np.asarray(vq._unpack(codes, entries.shape[1], entries.shape[0]))


# Encoding and decoding


@pytest.mark.slow
@settings(max_examples=40)
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
def test_codes_are_packed_into_bytes(codes, dtype, bytes_):
    x, entries = normal((3, 4, 12)), normal((6, codes, 2))
    sent = vq.encode(entries, x)
    assert sent.dtype == dtype
    assert sent.nbytes == bytes_ * 3 * 4  # six groups per position
    np.testing.assert_array_equal(unpacked(sent, entries), oracle_distances(x, entries).argmin(-1))


def test_ties_go_to_the_lowest_number():
    entries = np.zeros((1, 20, 2), np.float32)
    entries[0, 5:] = [1, 0]
    entries[0, 7] = [-1, 0]
    # Nearest entries: 0 to 4; all but 7; 5, 6 and 8 to 19; 0 to 4 and 7.
    x = np.array([[0, 0], [0.5, 3], [0.75, 0], [-0.5, 1]], np.float32)
    assert unpacked(vq.encode(entries, x), entries).ravel().tolist() == [0, 0, 5, 0]
    numbers = kmeans._all_distances(jnp.asarray(x.T[None]), jnp.asarray(entries))
    assert numbers.ravel().tolist() == [0, 0, 5, 0]


SEARCHES = {
    "running": jax.jit(kmeans._running_minimum),
    "at once": jax.jit(kmeans._all_distances),
    "product": jax.jit(  # twin: the usual expanded formula
        lambda v, e: jnp.argmin(
            jnp.square(e).sum(-1)[..., None] - 2 * jnp.einsum("gnd,gdb->gnb", e, v), axis=1
        )
    ),
}


def cloud(name):
    """Returns vectors [2, 8, 600] and entries [2, 64, 8] of one distribution."""
    random = np.random.default_rng(3)
    x = random.normal(size=(2, 664, 8))
    if name == "spread":  # thirty orders of magnitude
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
    """Compares chosen entries with the nearest ones.

    Returns:
      The squared distance of each chosen entry over that of the nearest, minus 1; and True where
      the two nearest entries can be distinguished in float32.
    """
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
def test_all_searches_find_the_nearest_entry_at_any_mean(name):
    vectors, entries = cloud(name)
    numbers = {method: np.asarray(search(vectors, entries)) for method, search in SEARCHES.items()}
    for method in ("running", "at once"):
        excess, apart = nearness(vectors, entries, numbers[method])
        assert excess.max() < 20 * 2.0**-24
        assert not excess[apart].any()
    same = numbers["running"] == numbers["at once"]
    assert same[apart].all()
    if name == "integers":  # exact arithmetic, and ties go to the lowest number
        lowest = oracle_distances(
            np.asarray(vectors).transpose(0, 2, 1)[0], np.asarray(entries)[:1]
        ).argmin(-1)[:, 0]
        np.testing.assert_array_equal(numbers["at once"][0], lowest)
        assert same.all()
        assert not apart.all()
    if name in ("100", "1e4"):
        assert nearness(vectors, entries, numbers["product"])[0].max() > 1e-3


@pytest.mark.full_compile
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_codes_do_not_depend_on_the_backend(mean, monkeypatch, fresh_traces):
    """Encodes two stages through both branches of `platform_dependent`."""
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


@pytest.mark.medium
@pytest.mark.full_compile
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (2, 4096, 6), (5000, 6), (6,)])
def test_chunk_size_does_not_change_codes(shape, monkeypatch):
    x, entries = normal(shape), normal((2, 3, 9, 2))  # two stages
    whole = np.asarray(vq.encode(entries, x))
    monkeypatch.setattr(kmeans, "_CACHED", 24)
    for channels in (1, 4, 64):  # one group per chunk, two (the last chunk overlaps), and all
        monkeypatch.setattr(kmeans, "_CHANNELS", channels)
        np.testing.assert_array_equal(vq.encode(entries, x), whole)
    vq_rows = vq.rows_of(jnp.asarray(x))
    length = max(1, vq_rows.shape[1] // 3)
    at_once = kmeans._chunked(vq_rows, jnp.asarray(entries), length, 3, kmeans._all_distances)
    numbers = vq._unpack(jnp.asarray(whole), 9, 6)
    np.testing.assert_array_equal(at_once.reshape(numbers.shape), numbers)


@pytest.mark.medium
@pytest.mark.full_compile
@pytest.mark.parametrize("codes", [1, 2, 3, 7, 8, 9, 16, 21])
def test_running_minimum_agrees_for_any_number_of_codes(codes):
    vectors, entries = (jnp.asarray(normal((2, *s), codes)) for s in ((3, 50), (codes, 3)))
    vectors = vectors.at[0, 1, 7].set(jnp.nan)  # never closer: code 0
    numbers = np.asarray(kmeans._running_minimum(vectors, entries))
    finite = jnp.nan_to_num(vectors)
    expected = np.array(kmeans._all_distances(finite, entries))
    expected[0, 7] = 0
    np.testing.assert_array_equal(numbers, expected)


def test_codebook_of_all_vectors_is_the_identity():
    random = np.random.default_rng(0)
    x = random.integers(-20, 20, (4, 3, 3, 4)).astype(np.float32)
    entries = x.reshape(-1, 2, 2).transpose(1, 0, 2)  # all vectors of the batch
    np.testing.assert_array_equal(vq.decode(entries, vq.encode(entries, x)), x)
    for group in range(2):  # twin: one vector is missing
        missing = np.where(
            (entries[group] == x[2, 1, 1, 2 * group : 2 * group + 2]).all(-1)[:, None],
            99.0,
            entries[group],
        )
        less = np.stack([missing if g == group else entries[g] for g in range(2)])
        assert not np.array_equal(vq.decode(less, vq.encode(less, x)), x)


def test_decode_returns_the_requested_dtype():
    entries = normal((2, 4, 3))
    codes = vq.encode(entries, normal((5, 6)))
    half = vq.decode(entries, codes, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, vq.decode(entries, codes).astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.full_compile
def test_update_compiles_once_and_equals_unjitted():
    x = jnp.asarray(normal((4, 6, 6, 8)))
    book = init(KEY, x, codes=16, dims=4)
    compiled = jax.jit(lambda book, key, x: vq.update(book, key, x))  # separate cache
    (a, _), (b, _) = compiled(book, KEY, x), vq.update(book, KEY, x)
    # `atol`, because entries near 0 are sums of larger values.
    np.testing.assert_allclose(a.entries, b.entries, rtol=1e-6, atol=1e-7)
    compiled(a, KEY, x + 1)
    assert compiled._cache_size() == 1
    np.testing.assert_array_equal(jax.jit(vq.encode)(book.entries, x), vq.encode(book.entries, x))


def on_four(devices):
    """Returns a group of four devices, and the shardings of arrays in it, split and whole."""
    mesh = jax.make_mesh(
        (4,), ("batch",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,)
    )
    return mesh, jax.NamedSharding(mesh, jax.P("batch")), jax.NamedSharding(mesh, jax.P())


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize("samples", [2, 0])
def test_a_group_learns_from_the_whole_batch(devices, samples):
    """Compares a batch split over four devices with the same batch on one device."""
    mesh, split, everywhere = on_four(devices)
    x = jnp.asarray(normal((8, 5, 5, 8)))
    book = init(KEY, x, codes=16, dims=4)
    update = functools.partial(vq.update, samples=samples)
    alone, health = jax.jit(update)(book, KEY, x)
    arguments = jax.device_put(book, everywhere), KEY, jax.device_put(x, split)
    program = jax.jit(on_group(update, mesh), out_shardings=everywhere)
    together, group_health = program(*arguments)
    # Every device draws the same vectors, so that the codebook does not even differ by rounding.
    same = np.testing.assert_array_equal if samples else np.testing.assert_allclose
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        same(other, one, **({} if samples else {"rtol": 1e-5, "atol": 1e-7}))
    assert float(group_health["perplexity"]) == pytest.approx(float(health["perplexity"]))
    copies = [np.asarray(shard.data) for shard in together.entries.addressable_shards]
    assert len(copies) == 4
    assert all(np.array_equal(copies[0], other) for other in copies)
    if samples:  # two draws, and the number of vectors that are not finite
        text = program.lower(*arguments).compile().as_text()
        exchanged = re.findall(r"= (\S+) (all-\w+|collective-\w+)", text)
        assert sum(kind == "all-gather" for _, kind in exchanged) == 2
        assert all(shape.startswith("f32[]") for shape, kind in exchanged if kind != "all-gather")


def test_a_group_encodes_its_parts(devices):
    _, split, everywhere = on_four(devices)
    x = jnp.asarray(normal((8, 5, 5, 8)))
    book = init(KEY, x, codes=16, dims=4)
    codes = jax.jit(vq.encode)(jax.device_put(book.entries, everywhere), jax.device_put(x, split))
    assert codes.sharding.is_equivalent_to(split, codes.ndim)
    np.testing.assert_array_equal(codes, vq.encode(book.entries, x))


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "codes", "dims"),
    [((128, 32, 32, 16), 256, 8), ((128, 8, 8, 64), 256, 8), ((128, 16, 16, 32), 16, 4)],
)
def test_temporary_memory_stays_under_twice_the_message(shape, codes, dims):
    x = jax.ShapeDtypeStruct(shape, "float32")
    book = jax.eval_shape(lambda key, x: vq.init(key, x, codes, dims), jax.random.key(0), x)
    raw = 4 * np.prod(shape)

    def temporary(function, *arguments):
        return system.program_plan(jax.jit(function).lower(*arguments).compile()).temporary / raw

    assert temporary(vq.encode, book.entries, x) < 2
    assert temporary(vq.update, book, KEY, x) < 2

    def at_once(entries, x):  # twin: all distances in memory
        vectors = kmeans._vectors(vq.rows_of(x), dims)
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
def test_invalid_sizes_are_refused(codes, dims, message):
    with pytest.raises(UserError, match=message):
        init(KEY, jnp.ones((2, 8)), codes=codes, dims=dims)
