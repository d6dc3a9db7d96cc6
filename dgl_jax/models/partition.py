"""Partition of a network into modules, in plain Python."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from dgl_jax.errors import UserError

BALANCED = ("flops", "time")  # splits that depend on the costs of blocks and heads
_NAMES = ", ".join(repr(name) for name in ("count", *BALANCED))


@dataclass(frozen=True)
class BlockCosts:
    """Costs of all blocks and heads, as FLOPs or seconds.

    Attributes:
      first: cost of each block as the first one of a module. In training it is lower than `inner`,
        as no gradient with respect to the inputs is needed.
      inner: cost of each block at any later position in a module.
      heads: for each module, the cost of its head if it ends with each block; a single row if all
        modules have equal heads. The last entry of a row is the classifier.
    """

    first: tuple[float, ...]
    inner: tuple[float, ...]
    heads: tuple[tuple[float, ...], ...]

    def module(self, first: int, end: int, number: int) -> float:
        """Returns the cost of a module and its head.

        Args:
          first: index of its first block.
          end: index of the first block after it.
          number: index of the module.
        """
        heads = self.heads[number if len(self.heads) > 1 else 0]
        return self.first[first] + math.fsum(self.inner[first + 1 : end]) + heads[end - 1]

    def modules(self, starts: Sequence[int]) -> list[float]:
        """Returns the cost of each module, given the index of its first block."""
        ends = [*starts[1:], len(self.first)]
        return [self.module(*cut, number) for number, cut in enumerate(zip(starts, ends))]


def cuts(
    split: str, num_blocks: int, modules: int, costs: Callable[[], BlockCosts] | None = None
) -> tuple[int, ...]:
    """Returns the index of the first block of each module.

    Args:
      split: 'count' for equal numbers of blocks per module, with larger modules first if the
        numbers cannot be equal; 'flops' or 'time' to minimize the cost of the slowest module; or a
        list of the first blocks, such as '0,2,4'.
      num_blocks: number of blocks of the network.
      modules: number of modules.
      costs: returns the costs of blocks and heads; called for 'flops' and 'time' only.

    Returns:
      One entry per module; the first is 0, and module k ends where module k + 1 begins.

    Raises:
      UserError: there are more modules than blocks, or `split` is a list that does not describe
        `modules` modules, or it is something else.
      ValueError: `costs` is missing for 'flops' or 'time'.
    """
    if not 1 <= modules <= num_blocks:
        raise UserError(
            f"config.model.modules={modules}: the network has {num_blocks} blocks and each module "
            f"needs at least one; 1 to {num_blocks} would work"
        )
    if split == "count":
        size, larger = divmod(num_blocks, modules)
        return tuple(k * size + min(k, larger) for k in range(modules))
    if split in BALANCED:
        if costs is None:
            raise ValueError(f"a split by {split} needs the costs of the blocks")
        return balanced(costs().module, num_blocks, modules)
    remedy = (
        f"{_NAMES} would work, or a list of config.model.modules={modules} first blocks such as "
        f"'{_example(num_blocks, modules)}'"
    )
    try:
        positions = [float(part) for part in split.split(",")]
        starts = tuple(math.floor(position) for position in positions)
    except (ValueError, OverflowError):
        raise UserError(
            f"config.model.split={split!r}: neither {_NAMES} nor a list of whole numbers; {remedy}"
        ) from None
    problem = None
    # Numbers such as 2.5 are parsed on purpose: the error message then names the valid neighbors.
    inside = next((position for position in positions if position % 1), None)
    if len(starts) != modules:
        problem = f"a list of {len(starts)} first blocks, but config.model.modules={modules}"
    elif starts[0] != 0:
        problem = "the first module must begin at block 0"
    elif inside is not None and inside < num_blocks - 1:
        low = math.floor(inside)
        problem = (
            f"{inside:g} would cut inside block {low}; the nearest places to cut are {low} and "
            f"{low + 1}"
        )
    elif any(b <= a for a, b in pairwise(starts)):
        problem = "the first blocks must increase"
    elif positions[-1] > num_blocks - 1:
        problem = (
            f"no module can begin at {positions[-1]:g}: the last block of this network is "
            f"{num_blocks - 1}, the nearest place to cut"
        )
    if problem:
        raise UserError(f"config.model.split={split!r}: {problem}; {remedy}")
    return starts


def _example(num_blocks: int, modules: int) -> str:
    return ",".join(map(str, cuts("count", num_blocks, modules)))


def balanced(cost: Callable[[int, int, int], float], count: int, segments: int) -> tuple[int, ...]:
    """Cuts a sequence into contiguous, non-empty segments with minimal maximum cost.

    This is linear partitioning by exact dynamic programming over (end, number of segments). Of
    equally good solutions it returns the one with longer early segments.

    Args:
      cost: `cost(first, end, number)` is the cost of the items `first` to `end`, exclusive, as the
        segment of this number. It may be any function, not only a sum over the items.
      count: number of items.
      segments: number of segments, 1 to `count`.

    Returns:
      Index of the first item of each segment; the first entry is 0.

    Raises:
      ValueError: `segments` is out of range.
    """
    if not 1 <= segments <= count:
        raise ValueError(f"{count} items cannot be cut into {segments} non-empty segments")
    # best[end]: minimal maximum cost of the items before `end`, for the number of segments so far.
    best = [0.0] + [inf] * count
    last_starts: list[list[int]] = []
    for number in range(segments):
        extended, last_start = [inf] * (count + 1), [0] * (count + 1)
        for end in range(number + 1, count + 1):
            for first in range(number, end):
                worst = max(best[first], cost(first, end, number))
                # `<=` prefers the later start of the last segment: longer early segments.
                if worst <= extended[end]:
                    extended[end], last_start[end] = worst, first
        best = extended
        last_starts.append(last_start)
    starts, end = [], count
    for last_start in reversed(last_starts):
        end = last_start[end]
        starts.append(end)
    return tuple(reversed(starts))
