"""Random streams: all keys are derived in this file, so that no two uses share one.

Keys form a tree. To derive a key, a stream folds in its own constant first and then the numbers
that identify the key, always equally many and in the same order. Keys of two streams therefore
differ by their constants, and two keys of one stream by the first number that differs. No values
are drawn from a key from which other keys are derived. (The key implementation `unsafe_rbg` breaks
this: its `fold_in` ignores the order of the numbers.)

    root(seed)
        block_params(n), head_params(n)        initial values of block n, of the head after n blocks
        adapter_params(n)                      initial values of the adapter in front of block n
        orthogonal(p, n, i)                    orthogonal weights, array i of part p at block n
        augmentation(step)                     augmentation of training batch `step`
        module(k)                              `ModuleState.rng`
            update(t)                          random operations inside the module at its update t
                micro_batch(i)
                    block(n), head(), adapter()
            codec(t)                           codec of module k at its update t
                stage(s)                       stages after the first, with the same streams below
                    pool(), first(), entry(n)  initialization of a codebook
                    sample(), restart_pool(), restart()
                rest()                         vectors that initialize the later stages
            gradient_codec(t)                  codec of the gradient sent down at update t, likewise
            synthesizer_params()               initial values of the module's synthesizer
        probe()                                diagnostics
            module(k), update(t)               random operations inside module k, as above
            directions(k)                      directions in the input space of module k
                part(i)                        their i-th part

Random numbers on the host have other generators: `bits` for the order and the crops of examples,
`ring` for replay, and `schedule.drawn` for the turns of the simulated engine.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Key, UInt32

Number = int | Int[Any, ""]  # a Python integer, or a traced or host array


@dataclass(frozen=True)
class Stream:
    """Function that derives the keys of one stream, called as `update(key, n)`.

    Attributes:
      constant: distinguishes the streams. Changing it changes the results of every run.
      numbers: how many numbers identify a key of the stream.
    """

    constant: int
    numbers: int = 0

    def __call__(self, key: Key[Array, ""], *numbers: Number) -> Key[Array, ""]:
        """Derives the key with these numbers from `key`."""
        assert len(numbers) == self.numbers, (
            f"a key of this stream takes {self.numbers} numbers, got {len(numbers)}"
        )
        for number in (self.constant, *numbers):
            key = jax.random.fold_in(key, number)
        return key


block_params = Stream(1, 1)  # initial values of a block, by its index in the whole network
head_params = Stream(2, 1)  # initial values of a head, by the number of blocks in front of it
adapter_params = Stream(18, 1)  # initial values of an adapter, by the index of the block after it
augmentation = Stream(3, 1)  # augmentation of a training batch, by step
module = Stream(4, 1)  # root of a module's keys, by k
update = Stream(5, 1)  # update of a module, by its number of earlier updates
micro_batch = Stream(6, 1)  # micro-batch of an update; a batch that is not split has number 0
block = Stream(7, 1)  # random operations of a block, such as dropout, by its index
head = Stream(8)  # random operations of the objective
adapter = Stream(19)  # random operations of the adapter
codec = Stream(9, 1)  # codec of a module, by update
pool = Stream(11)  # sample of vectors that initializes a codebook
first = Stream(12)  # choice of the first entry in that sample, or of all entries at once
entry = Stream(13, 1)  # choice of a later entry
sample = Stream(14)  # sample of vectors that updates a codebook
restart_pool = Stream(15)  # sample of vectors that may replace dead entries
restart = Stream(16)  # choice of the replacements in that sample
rest = Stream(17)  # sample of vectors that initializes the stages after the first
synthesizer_params = Stream(20)  # initial values of the synthesizer behind a module
gradient_codec = Stream(21, 1)  # codec of the gradients that a module sends down, by update
probe = Stream(22)  # root of the keys of the diagnostics
directions = Stream(23, 1)  # random directions in the input space of a module, by k
orthogonal = Stream(24, 3)  # orthogonal initial weights, by part, its number and array
_stage = Stream(10, 1)


def stage(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Derives the key of a codebook's stage; for the first stage, number 0, it is `key` itself."""
    return _stage(key, number) if number else key


def part(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Derives the key of a part of the directions of a module, without a constant."""
    return jax.random.fold_in(key, number)


def below(bits: UInt32[Array, "*S"], limit: int) -> Int32[Array, "*S"]:
    """Converts uniform bits to integers from 0 to `limit` - 1.

    Their probabilities differ by at most 2^-32. `jax.random.randint` avoids most of this with four
    times the work, which takes as much longer to compile.
    """
    return (bits % jnp.uint32(limit)).astype(jnp.int32)


# Streams on the host: the first number after the seed in `bits` and `ring`.
VALIDATION, SUBSET, EPOCH, CROP, RING = range(5)


def root(seed: Number) -> Key[Array, ""]:
    """Returns the root key of a run, which depends on the seed alone.

    The implementation is fixed, so that a run resumed under another `JAX_DEFAULT_PRNG_IMPL` draws
    the same numbers.
    """
    return jax.random.key(seed, impl="threefry2x32")


def bits(seed: int, *stream: int) -> np.random.BitGenerator:
    """Returns a stream of random bits on the host.

    Callers sort raw bits with a stable sort instead of calling `Generator.permutation`: NumPy
    guarantees the bits forever but a permutation only within a release, and runs must resume after
    an upgrade.

    Args:
      seed: the seed of the run.
      stream: VALIDATION, SUBSET, EPOCH or CROP, followed by numbers that the stream defines.
    """
    return np.random.Philox(np.random.SeedSequence([seed, *stream]))


def ring(seed: int, number: int) -> tuple[int, ...]:
    """Returns the seed of the replay ring at the entrance of module `number` (its index k)."""
    return (seed, RING, number)


def augment_key(seed: Number, step: Number) -> Key[Array, ""]:
    """Returns the random key for augmenting a training batch.

    The key depends on the two arguments alone, so a resumed run draws the same augmentations as an
    uninterrupted one. Both arguments may be traced.
    """
    return augmentation(root(seed), step)
