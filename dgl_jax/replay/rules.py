"""The rules that choose what is read next from a ring."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dgl_jax.registry import RULES, Kind

# (uses of the packets, newest first; slot of the newest; slots of the ring; uses allowed; seed) -> age of the packet to read
Rule = Callable[[Int[np.ndarray, " n"], int, int, int, tuple[int, ...]], int]


def least_used_latest(
    uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]
) -> int:
    """The paper's rule: of the packets used least often the newest."""
    return int(uses.argmin())


def fifo(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Of the packets used least often the oldest."""
    return len(uses) - 1 - int(uses[::-1].argmin())


def uniform(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Any packet, all equally likely."""
    slots = np.sort((newest - np.flatnonzero(uses < limit)) % size)
    return (newest - int(np.random.default_rng(seed).choice(slots))) % size


def released(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """What the authors' published code does: `least_used_latest`, but the oldest packet of a full ring passes for the newest.

    There `>` stands where `>=` was meant. Its count of uses also begins at 1 (see `Ring`), which matters for `max_reuse` alone.
    """
    age = int(uses.argmin())
    return size - 1 if len(uses) == size and uses[-1] == uses[age] else age


@dataclass(frozen=True)
class RuleKind(Kind):
    """A rule: `make` is the `Rule` itself.

    Attributes:
      counts_from_one: a packet counts as used once when it is written; see `limit_of`.
    """

    counts_from_one: bool = False


RULES.ship(
    least_used_latest=RuleKind(least_used_latest),
    fifo=RuleKind(fifo),
    uniform=RuleKind(uniform),
    released=RuleKind(released, counts_from_one=True),
)


ANY_NUMBER = np.iinfo(np.int64).max


def limit_of(rule: str, size: int, max_reuse: int) -> int:
    """Reads a packet allows."""
    if RULES[rule].counts_from_one and max_reuse:  # counts from 1; a ring of one packet stays there
        return max_reuse - 1 if size > 1 or max_reuse == 1 else ANY_NUMBER
    return max_reuse or ANY_NUMBER
