"""Replay rules, which choose the next message to read from a ring."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dgl_jax.config.registry import RULES, Kind
from dgl_jax.errors import UserError

# (read counts, newest message first; slot of the newest message; number of slots; maximum number of
# uses per message; seed) -> age of the message to read
Rule = Callable[[Int[np.ndarray, " n"], int, int, int, tuple[int, ...]], int]


def least_used_latest(
    uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]
) -> int:
    """Chooses the newest of the least used messages; the rule of the DGL paper."""
    return int(uses.argmin())


def fifo(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Chooses the oldest of the least used messages."""
    return len(uses) - 1 - int(uses[::-1].argmin())


def uniform(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Chooses any message below the limit with equal probability."""
    slots = np.sort((newest - np.flatnonzero(uses < limit)) % size)
    return (newest - int(np.random.default_rng(seed).choice(slots))) % size


def released(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Reproduces the authors' released code, which differs from `least_used_latest` by an error.

    That code compares with `>` instead of `>=`, so that it takes the oldest message of a full ring
    for the newest. It also counts uses from 1 (see `Ring`), which affects only `max_reuse`.
    """
    age = int(uses.argmin())
    return size - 1 if len(uses) == size and uses[-1] == uses[age] else age


@dataclass(frozen=True)
class RuleKind(Kind):
    """Registry entry of a replay rule; its `make` is the `Rule` function itself.

    Attributes:
      counts_from_one: True if writing a message counts as its first use; see `limit_of`.
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
    """Returns the number of times a message may be read, which is at least 1.

    Raises:
      UserError: the rule counts from one and would let no message be read.
    """
    if RULES[rule].counts_from_one and max_reuse:
        if max_reuse == 1:
            raise UserError(
                f"config.replay.max_reuse=1: config.replay.rule={rule} counts writing a message as "
                "its first use, so none could be read; use 2 or more, or 0 for no limit"
            )
        # In a ring of one slot that rule's count stays at 1.
        return max_reuse - 1 if size > 1 else ANY_NUMBER
    return max_reuse or ANY_NUMBER
