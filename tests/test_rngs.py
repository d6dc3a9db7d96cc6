"""Random streams: no two keys of a run are equal, in the streams as they are defined and in what is really drawn."""

from collections import Counter
from functools import reduce
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.codecs import residual
from dgl_jax.core import rngs

SEEDS, MODULES, BLOCKS, UPDATES, MICRO_BATCHES, STAGES = (
    range(2),
    range(4),
    range(6),
    range(6),
    range(3),
    range(3),
)
# Streams below one another, with the numbers that tell the keys of each apart.
OF_A_CODEBOOK = {
    "pool": (),
    "first": (),
    "entry": (range(1, 4),),
    "sample": (),
    "restart_pool": (),
    "restart": (),
    "rest": (),
}
TREE = {
    "block_params": (BLOCKS,),
    "head_params": (BLOCKS,),
    "adapter_params": (BLOCKS,),
    "augmentation": (range(24),),
    "module": (
        MODULES,
        {
            "update": (
                UPDATES,
                {"micro_batch": (MICRO_BATCHES, {"block": (BLOCKS,), "head": (), "adapter": ()})},
            ),
            "codec": (UPDATES, {"stage": (STAGES, OF_A_CODEBOOK)}),
        },
    ),
}


def drawn(key, tree, path=()):
    """Every key of the streams in a tree, by its path."""
    for name, numbers in tree.items():
        *ranges, below = numbers if numbers and isinstance(numbers[-1], dict) else (*numbers, {})
        for chosen in product(*ranges):
            found = getattr(rngs, name)(key, *chosen)
            here = (*path, name, *chosen)
            if below:
                yield from drawn(found, below, here)
            if name != "stage":  # whose first key is that of the codec
                yield here, found


def shared(keys):
    """Names of keys that have equal data."""
    data = {
        name: tuple(np.asarray(jax.random.key_data(key)).tolist()) for name, key in keys.items()
    }
    seen = Counter(data.values())
    return sorted(str(name) for name, value in data.items() if seen[value] > 1)


def test_no_two_keys_of_a_run_are_equal():
    keys = {(seed, *path): key for seed in SEEDS for path, key in drawn(rngs.root(seed), TREE)}
    assert len(keys) > 2000
    assert shared(keys) == []
    names = {part for path in keys for part in path if isinstance(part, str)} | {"stage"}
    streams = {name: value for name, value in vars(rngs).items() if isinstance(value, rngs.Stream)}
    assert names == {name.removeprefix("_") for name in streams}, (
        "a stream that this test does not draw"
    )
    assert sorted(stream.constant for stream in streams.values()) == list(
        range(1, 1 + len(streams))
    )


def test_twin_numbers_folded_in_without_the_name_of_their_stream_collide():
    """How keys were derived once: at update 3 a block's dropout had the key of the codec at the update of its number."""
    state = jax.random.key(0)
    keys = {
        ("dropout", t, n): jax.random.fold_in(jax.random.fold_in(state, t), n)
        for t in UPDATES
        for n in BLOCKS
    }
    keys |= {("codec", t): jax.random.fold_in(jax.random.fold_in(state, 3), t) for t in UPDATES}
    assert "('dropout', 3, 5)" in shared(keys)
    assert "('codec', 5)" in shared(keys)


@pytest.mark.slow
def test_no_two_draws_of_a_codebook_have_the_same_key(monkeypatch):
    """The start and two updates of three stages, spied upon where the numbers are drawn."""
    used = Counter()

    def spied(function):
        def draw(key, *args, **kwargs):
            used[function.__name__, *np.asarray(jax.random.key_data(key)).tolist()] += 1
            return function(key, *args, **kwargs)

        return draw

    for name in ("uniform", "randint"):
        monkeypatch.setattr(jax.random, name, spied(getattr(jax.random, name)))
    module, x = (
        rngs.module(rngs.root(0), 0),
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 2)), jnp.float32),
    )
    monkeypatch.setattr(
        jax.lax,
        "fori_loop",
        lambda a, b, body, value: reduce(lambda v, n: body(n, v), range(a, b), value),
    )
    book = residual.init(rngs.codec(module, 0), x, 3, codes=2, dims=2)
    after_start = used.total()
    for t in range(2):
        book, _ = residual.update(book, rngs.codec(module, t), x, samples=1)
    # A start draws a pool, a first and a second entry in each stage, and the rest. An update draws its sample twice, alike, for the
    # first stage and for what later ones see; and the pool and the choice of restarts.
    assert after_start == 3 * 3 + 1
    assert sorted(count for count in used.values() if count > 1) == [2, 2]
    assert len({key[1:] for key in used}) == len(used)


def test_a_key_depends_on_no_default_of_the_environment():
    plain = jax.random.key_data(rngs.module(rngs.root(3), 1))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.key_data(rngs.module(rngs.root(3), 1)), plain)
        assert jax.random.key_data(jax.random.key(3)).shape == (4,)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        np.testing.assert_array_equal(jax.random.key_data(rngs.module(rngs.root(3), 1)), plain)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_streams_of_keys_of_any_kind(impl):
    key = jax.random.key(0, impl=impl)
    keys = {
        path: k
        for path, k in drawn(
            key, {"module": (range(3), {"codec": (range(3),), "update": (range(3),)})}
        )
    }
    assert shared(keys) == []


def test_streams_of_the_host_are_apart():
    streams = [
        (rngs.VALIDATION,),
        (rngs.SUBSET,),
        (rngs.EPOCH, 1),
        (rngs.EPOCH, 2),
        (rngs.CROP, 1),
        (rngs.CROP, 2),
    ]
    found = [
        rngs.bits(seed, *stream).random_raw(4).tolist() for seed in (0, 1) for stream in streams
    ]
    for seed, k, read in product((0, 1), (1, 2), (0, 1)):  # as a ring draws
        found.append(
            np.random.Philox(np.random.SeedSequence([*rngs.ring(seed, k), read]))
            .random_raw(4)
            .tolist()
        )
    assert len(set(map(tuple, found))) == len(found)
