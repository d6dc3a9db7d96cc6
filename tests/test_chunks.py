"""Tests of loops over chunks of a batch, against one call with the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax import system
from dgl_jax.ops.cpu import chunks

pytestmark = pytest.mark.full_compile


@pytest.mark.parametrize(
    ("batch", "least", "size"),
    [(24, 8, 8), (20, 8, 10), (23, 8, 23), (4, 8, 4), (6, 0, 1), (6, 6, 6)],
)
def test_chunk_size_is_the_smallest_divisor_that_is_large_enough(batch, least, size):
    assert chunks.chunk_size(batch, least) == size


def test_chunks_hold_every_image_once_spread_over_the_batch():
    parts = [chunks.chunk(jnp.arange(24)[:, None], 8, i)[:, 0] for i in range(3)]
    np.testing.assert_array_equal(parts, [range(i, 24, 3) for i in range(3)])


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_sum_and_map_over_chunks_equal_the_whole_batch(size):
    x, y = jnp.arange(12.0).reshape(6, 2), jnp.arange(6.0)
    np.testing.assert_array_equal(
        jax.jit(lambda x, y: chunks.sum_chunks(lambda x, y: y @ x, size, x, y))(x, y), y @ x
    )
    squares = jax.jit(lambda x: chunks.map_chunks(lambda x: (x**2).sum(1), size, x))(x)
    np.testing.assert_array_equal(squares, [1, 13, 41, 85, 145, 221])


def temporary(total):
    """Returns the temporary memory of a sum over chunks, in units of the summed array.

    The array is computed elementwise from another temporary array.
    """

    def step(x):
        first = jnp.sort(x, 1)
        return total(lambda part: part.T @ part, 8, first * jnp.cos(first))

    x = jax.ShapeDtypeStruct((4096, 64), "float32")
    return system.program_plan(jax.jit(step).lower(x).compile()).temporary / (4096 * 64 * 4)


def test_summed_array_reuses_the_buffer_of_its_producer():
    assert temporary(chunks.sum_chunks) < 1.5


def test_twin_a_sum_over_two_arrays_needs_a_second_buffer():
    def total(function, size, x):
        # The sum needs both arrays at once, and the second one is computed from all of the first.
        return chunks.sum_chunks(lambda a, b: a.T @ b, size, x, jnp.sort(x, 0))

    assert temporary(total) > 1.9
