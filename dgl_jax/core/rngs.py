"""Random streams: every key is derived here, so that no two uses share one.

Keys form a tree. On the way down a stream's own constant is folded in first, then the numbers that tell its keys apart, always as
many of them and in the same order: two streams part at their constants, two keys of a stream at the first number in which they
differ. Nothing is drawn from a key that others are derived from. (Keys of the kind `unsafe_rbg` cannot be kept apart: there it
does not matter in which order numbers are folded in.)

    root(seed)
        block_params(n), head_params(n)        initial values of block n, and of the head behind n blocks
        adapter_params(n)                      and of the adapter in front of block n
        augmentation(step)                     of training batch `step`
        module(k)                              `ModuleState.rng`
            update(t)                          random operations inside the module at its update t
                micro_batch(i)
                    block(n), head(), adapter()
            codec(t)                           of what module k hands on at its update t
                stage(s)                       stages after the first; below it the same as here
                    pool(), first(), entry(n)  the start of a codebook
                    sample(), restart_pool(), restart()
                rest()                         the vectors from which later stages start

What is drawn on the host has generators of its own: `bits` for the order and the crops of examples, `ring` for replay,
`engines/turns.py` for the turns of the simulated engine.
"""

import enum
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

Number = int | Int[Any, ""]  # a Python integer, or a traced or host array


class _Stream(enum.IntEnum):
    """Constants of the streams; their values belong to the numbers of every run."""

    BLOCK_PARAMS = 1
    HEAD_PARAMS = 2
    AUGMENTATION = 3
    MODULE = 4
    UPDATE = 5
    MICRO_BATCH = 6
    BLOCK = 7
    HEAD = 8
    CODEC = 9
    STAGE = 10
    POOL = 11
    FIRST = 12
    ENTRY = 13
    SAMPLE = 14
    RESTART_POOL = 15
    RESTART = 16
    REST = 17
    ADAPTER_PARAMS = 18
    ADAPTER = 19


# Streams of the host, the first number after the seed in `bits` and `ring`.
VALIDATION, SUBSET, EPOCH, CROP, RING = range(5)


def root(seed: Number) -> Key[Array, ""]:
    """Returns the key of a run: a function of the seed, whatever implementation the environment prefers.

    A run that is resumed where `JAX_DEFAULT_PRNG_IMPL` says something else draws what it would have drawn.
    """
    return jax.random.key(seed, impl="threefry2x32")


def block_params(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of the initial values of a block, by its number in the whole network."""
    return _derived(key, _Stream.BLOCK_PARAMS, number)


def head_params(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of the initial values of the head that has this number of blocks in front of it."""
    return _derived(key, _Stream.HEAD_PARAMS, number)


def adapter_params(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of the initial values of the adapter in front of a block."""
    return _derived(key, _Stream.ADAPTER_PARAMS, number)


def augmentation(key: Key[Array, ""], step: Number) -> Key[Array, ""]:
    """Returns the key of the augmentation of a training batch."""
    return _derived(key, _Stream.AUGMENTATION, step)


def module(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key that a module keeps."""
    return _derived(key, _Stream.MODULE, number)


def update(key: Key[Array, ""], updates: Number) -> Key[Array, ""]:
    """Returns the key of a module's update, by how many it has made before; `key` is the module's."""
    return _derived(key, _Stream.UPDATE, updates)


def micro_batch(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of a micro-batch of an update; a whole batch is number 0."""
    return _derived(key, _Stream.MICRO_BATCH, number)


def block(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of the random operations of a block in one forward pass, such as dropout."""
    return _derived(key, _Stream.BLOCK, number)


def head(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key of the random operations of a module's head in one forward pass."""
    return _derived(key, _Stream.HEAD)


def adapter(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key of the random operations of a module's adapter in one forward pass."""
    return _derived(key, _Stream.ADAPTER)


def codec(key: Key[Array, ""], updates: Number) -> Key[Array, ""]:
    """Returns the key of the codec at a module's update; `key` is the module's."""
    return _derived(key, _Stream.CODEC, updates)


def stage(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of a codebook's stage: that of the first one, number 0, is `key` itself."""
    return _derived(key, _Stream.STAGE, number) if number else key


def pool(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key that draws the vectors from which a codebook starts."""
    return _derived(key, _Stream.POOL)


def first(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key that chooses a codebook's first entry, or all of a sample."""
    return _derived(key, _Stream.FIRST)


def entry(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key that chooses entry `number` of a codebook after the first."""
    return _derived(key, _Stream.ENTRY, number)


def sample(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key that draws the vectors from which a codebook learns."""
    return _derived(key, _Stream.SAMPLE)


def restart_pool(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key that draws the vectors among which dead entries begin anew."""
    return _derived(key, _Stream.RESTART_POOL)


def restart(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key that chooses among them."""
    return _derived(key, _Stream.RESTART)


def rest(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the key that draws the vectors from which the stages after the first start."""
    return _derived(key, _Stream.REST)


def bits(seed: int, *stream: int) -> np.random.BitGenerator:
    """Returns one of the seed's streams of random bits on the host.

    Raw bits and a stable sort instead of Generator.permutation: NumPy promises the bits for good, a permutation only
    until the next release, and a run must be able to resume after an upgrade.

    Args:
      stream: VALIDATION, SUBSET, EPOCH or CROP, then numbers of its own.
    """
    return np.random.Philox(np.random.SeedSequence([seed, *stream]))


def ring(seed: int, number: int) -> tuple[int, ...]:
    """Returns the seed of the replay ring at the entrance of module `number`."""
    return (seed, RING, number)


def _derived(key: Key[Array, ""], stream: _Stream, *numbers: Number) -> Key[Array, ""]:
    for number in (int(stream), *numbers):
        key = jax.random.fold_in(key, number)
    return key
