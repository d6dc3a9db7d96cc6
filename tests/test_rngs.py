"""Tests that all random keys of a run differ: all keys of the streams, and the keys in use."""

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
# The tree of streams, with the numbers that identify the keys of each stream.
CODEBOOK_STREAMS = {
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
    "orthogonal": (range(3), BLOCKS, range(4)),
    "augmentation": (range(24),),
    "module": (
        MODULES,
        {
            "update": (
                UPDATES,
                {"micro_batch": (MICRO_BATCHES, {"block": (BLOCKS,), "head": (), "adapter": ()})},
            ),
            "codec": (UPDATES, {"stage": (STAGES, CODEBOOK_STREAMS)}),
            "gradient_codec": (UPDATES, {"stage": (STAGES, CODEBOOK_STREAMS)}),
            "synthesizer_params": (),
        },
    ),
    "probe": (
        {
            "module": (MODULES, {"update": (range(1),)}),
            "directions": (MODULES, {"part": (range(4),)}),
        },
    ),
}


def drawn(key, tree, path=()):
    """Yields (path, key) for every key in a tree of streams."""
    for name, numbers in tree.items():
        *ranges, below = numbers if numbers and isinstance(numbers[-1], dict) else (*numbers, {})
        for chosen in product(*ranges):
            derived = getattr(rngs, name)(key, *chosen)
            here = (*path, name, *chosen)
            if below:
                yield from drawn(derived, below, here)
            if name != "stage":  # its first key equals the codec's key on purpose
                yield here, derived


def shared(keys):
    """Returns the names of keys that have equal data."""
    data = {
        name: tuple(np.asarray(jax.random.key_data(key)).tolist()) for name, key in keys.items()
    }
    seen = Counter(data.values())
    return sorted(str(name) for name, value in data.items() if seen[value] > 1)


@pytest.mark.medium
def test_no_two_keys_of_a_run_are_equal():
    keys = {(seed, *path): key for seed in SEEDS for path, key in drawn(rngs.root(seed), TREE)}
    assert len(keys) > 2000
    assert shared(keys) == []
    names = {part for path in keys for part in path if isinstance(part, str)} | {"stage"}
    streams = {name: value for name, value in vars(rngs).items() if isinstance(value, rngs.Stream)}
    assert names - {"part"} == {name.removeprefix("_") for name in streams}, (
        "this test does not cover all streams"
    )
    assert sorted(stream.constant for stream in streams.values()) == list(
        range(1, 1 + len(streams))
    )


def test_twin_keys_without_stream_constants_collide():
    """Derives keys without constants: dropout of block n at update 3 shares the codec's key."""
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
def test_no_two_draws_of_a_codebook_use_the_same_key(monkeypatch):
    """Records the keys of all draws while three stages are initialized and updated twice."""
    used = Counter()

    def recorded(function):
        def draw(key, *args, **kwargs):
            used[function.__name__, *np.asarray(jax.random.key_data(key)).tolist()] += 1
            return function(key, *args, **kwargs)

        return draw

    for name in ("uniform", "bits"):
        monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
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
    draws_of_init = used.total()
    for t in range(2):
        book, _ = residual.update(book, rngs.codec(module, t), x, samples=1)
    # Initialization draws a pool, a first and a second entry per stage, and the rest. An update
    # draws one sample for all stages, and per stage the pool and the choice of restarts.
    assert draws_of_init == 3 * 3 + 1
    assert set(used.values()) == {1}
    assert len({key[1:] for key in used}) == len(used)


def test_keys_do_not_depend_on_jax_defaults():
    plain = jax.random.key_data(rngs.module(rngs.root(3), 1))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.key_data(rngs.module(rngs.root(3), 1)), plain)
        assert jax.random.key_data(jax.random.key(3)).shape == (4,)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.random.key_data(rngs.module(rngs.root(3), 1)), plain)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_every_implementation_differ(impl):
    key = jax.random.key(0, impl=impl)
    keys = {
        path: k
        for path, k in drawn(
            key, {"module": (range(3), {"codec": (range(3),), "update": (range(3),)})}
        )
    }
    assert shared(keys) == []


def test_host_streams_differ():
    streams = [
        (rngs.VALIDATION,),
        (rngs.SUBSET,),
        (rngs.EPOCH, 1),
        (rngs.EPOCH, 2),
        (rngs.CROP, 1),
        (rngs.CROP, 2),
    ]
    samples = [
        rngs.bits(seed, *stream).random_raw(4).tolist() for seed in (0, 1) for stream in streams
    ]
    for seed, k, read in product((0, 1), (1, 2), (0, 1)):  # as a ring draws
        samples.append(
            np.random.Philox(np.random.SeedSequence([*rngs.ring(seed, k), read]))
            .random_raw(4)
            .tolist()
        )
    assert len(set(map(tuple, samples))) == len(samples)
