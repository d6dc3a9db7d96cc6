"""Tests that drawing the bits of a random function beforehand does not change its results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import host

from dgl_jax.config import options
from dgl_jax.core import drawing, rngs
from dgl_jax.core.drawing import DrawnFirst


def distributions(key):
    """Draws from a key in ways that initializers use."""
    a, b, c = jax.random.split(key, 3)
    return {
        "normal": 0.3 * jax.random.normal(a, (3, 5)),
        "truncated": jax.random.truncated_normal(jax.random.fold_in(a, 7), -2, 2, (4, 4)),
        "flips": jax.random.bernoulli(b, 0.3, (64,)),
        "integers": jax.random.randint(b, (33,), 0, 1000),
        "order": jax.random.permutation(jax.random.fold_in(b, 1), 50),
        "orthogonal": jax.nn.initializers.orthogonal()(c, (6, 6)),
        "half": jax.random.normal(c, (9,), jnp.bfloat16),  # from 16 bits
        "long": jax.random.bits(jax.random.fold_in(c, 0), (2, drawing._CHUNK + 3)),
        "empty": jax.random.normal(c, (0, 2)),
        "scalar": jax.random.uniform(c),
        "key": jax.random.fold_in(c, 2),
        "constant": jnp.arange(3.0),
    }


def layers(key):
    """Draws with keys that depend on computed values, or that other functions receive."""
    many = jax.vmap(lambda k: jax.random.normal(k, (3,)))(jax.random.split(key, 4))

    def body(key, _):
        key, part = jax.random.split(key)
        return key, jax.random.uniform(part, (2,))

    scanned = jax.lax.scan(body, key, length=3)[1]
    derived = jax.random.fold_in(key, jnp.argmax(many))
    other = jax.random.key(5, impl="rbg")
    return many, scanned, jax.random.uniform(derived, (4,)), jax.random.normal(other, (3,))


def same(one, other):
    pairs = zip(jax.tree.leaves(host(one)), jax.tree.leaves(host(other)), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.medium
@pytest.mark.full_compile
@pytest.mark.parametrize("function", [distributions, layers])
@pytest.mark.parametrize("seed", [0, 3])
def test_results_equal_those_of_the_function(function, seed):
    key = rngs.root(seed)
    program = DrawnFirst(function)
    assert same(program(key), jax.jit(function)(key))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), program.shapes(key))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(function, key))


def test_twin_other_bits_are_detected(monkeypatch):
    original = drawing._chunk
    monkeypatch.setattr(drawing, "_chunk", lambda key, start: original(key, start) ^ 1)
    key = rngs.root(0)
    assert not same(DrawnFirst(distributions)(key), jax.jit(distributions)(key))


def test_program_contains_no_generator():
    def function(key):
        return [jax.random.normal(jax.random.fold_in(key, n), (n,)) for n in range(1, 4)], key

    key, program = rngs.root(0), DrawnFirst(function)
    assert "threefry" in jax.jit(function).lower(key).as_text()
    assert "threefry" not in program._evaluate.lower(key, program._known(key)).as_text()


def test_other_generators_draw_inside_the_program(fresh_traces):
    def function(key):
        return jax.random.normal(key, (3,))

    with jax.threefry_partitionable(False):
        key, program = rngs.root(0), DrawnFirst(function)
        assert program._known(key) == []
        expected = function(key)
        assert same(program(key), expected)
    assert not same(function(key), expected)


@pytest.mark.medium
@pytest.mark.full_compile
@pytest.mark.parametrize(
    "arguments",
    [{}, {"codec": options("codec", name="vq", codes=4, dims=2)}, {"modules": 1, "heads": False}],
)
def test_initial_states_equal_those_of_one_program(arguments, tiny):
    spec = tiny.spec(**arguments)
    assert same(spec.init(), jax.jit(spec._states)(rngs.root(spec.seed)))
