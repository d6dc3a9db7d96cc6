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

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

Number = int | Int[Any, ""]  # a Python integer, or a traced or host array


@dataclass(frozen=True)
class Stream:
    """Derives the keys of one stream: `update(key, n)`.

    Attributes:
      constant: tells it from the other streams; its value belongs to the numbers of every run.
      numbers: how many numbers tell the keys of the stream apart.
    """

    constant: int
    numbers: int = 0

    def __call__(self, key: Key[Array, ""], *numbers: Number) -> Key[Array, ""]:
        """Returns the key of these numbers, below `key`."""
        assert len(numbers) == self.numbers, (
            f"a key of this stream takes {self.numbers} numbers, not {len(numbers)}"
        )
        for number in (self.constant, *numbers):
            key = jax.random.fold_in(key, number)
        return key


block_params = Stream(1, 1)  # initial values of a block, by its number in the whole network
head_params = Stream(2, 1)  # of the head that has this number of blocks in front of it
adapter_params = Stream(18, 1)  # of the adapter in front of a block
augmentation = Stream(3, 1)  # of a training batch
module = Stream(4, 1)  # what a module keeps
update = Stream(5, 1)  # of a module, by how many updates it has made before
micro_batch = Stream(6, 1)  # of an update; a whole batch is number 0
block = Stream(7, 1)  # random operations of a block in one forward pass, such as dropout
head = Stream(8)  # of a module's head
adapter = Stream(19)  # of a module's adapter
codec = Stream(9, 1)  # of a module, at the update of that number
pool = Stream(11)  # the vectors from which a codebook starts
first = Stream(12)  # a codebook's first entry, or all of a sample
entry = Stream(13, 1)  # a later entry
sample = Stream(14)  # the vectors from which a codebook learns
restart_pool = Stream(15)  # those among which dead entries begin anew
restart = Stream(16)  # which of them
rest = Stream(17)  # the vectors from which the stages after the first start
_stage = Stream(10, 1)


def stage(key: Key[Array, ""], number: Number) -> Key[Array, ""]:
    """Returns the key of a codebook's stage: that of the first one, number 0, is `key` itself."""
    return _stage(key, number) if number else key


# Streams of the host, the first number after the seed in `bits` and `ring`.
VALIDATION, SUBSET, EPOCH, CROP, RING = range(5)


def root(seed: Number) -> Key[Array, ""]:
    """Returns the key of a run: a function of the seed, whatever implementation the environment prefers.

    A run that is resumed where `JAX_DEFAULT_PRNG_IMPL` says something else draws what it would have drawn.
    """
    return jax.random.key(seed, impl="threefry2x32")


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
