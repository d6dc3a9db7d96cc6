"""Where a network is cut into modules. Plain Python."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from dgl_jax.errors import UserError

BALANCED = ("flops", "time")  # splits that look at what blocks and heads cost
_WAYS = ", ".join(repr(name) for name in ("count", *BALANCED))


@dataclass(frozen=True)
class BlockCosts:
    """What each block, and a head behind it, costs: FLOPs or a time, one entry a block.

    Attributes:
      first: of a block that begins a module. In training it is cheaper there: no gradient of its inputs is needed.
      inner: of a block further inside one.
      head: of the head where a module ends with this block; the last entry is the network's classifier.
    """

    first: tuple[float, ...]
    inner: tuple[float, ...]
    head: tuple[float, ...]

    def module(self, first: int, end: int) -> float:
        """Of a module made of blocks `first` up to, not including, `end`, and the head at its end."""
        return self.first[first] + math.fsum(self.inner[first + 1 : end]) + self.head[end - 1]


def cuts(
    split: str, num_blocks: int, modules: int, costs: Callable[[], BlockCosts] | None = None
) -> tuple[int, ...]:
    """The first block of each module: the first entry is 0, module k ends where module k + 1 begins.

    Args:
      split: 'count' for as many blocks a module as equally as possible, the larger modules first; 'flops' or 'time' for the
        slowest module as fast as possible; or the first blocks themselves, such as '0,2,4'.
      num_blocks: blocks of the network.
      modules: how many modules to cut it into.
      costs: for 'flops' and 'time', gives what blocks and heads cost in that unit; called for these two alone.

    Raises:
      UserError: more modules than blocks, or a list that does not describe `modules` modules.
    """
    if not 1 <= modules <= num_blocks:
        raise UserError(
            f"config.model.modules={modules}: the network has {num_blocks} blocks and each module needs at least one; "
            f"1 to {num_blocks} would work"
        )
    if split == "count":
        size, larger = divmod(num_blocks, modules)
        return tuple(k * size + min(k, larger) for k in range(modules))
    if split in BALANCED:
        if costs is None:
            raise ValueError(f"a split by {split} needs the costs of the blocks")
        return balanced(costs().module, num_blocks, modules)
    works = f"{_WAYS} would work, or config.model.modules={modules} first blocks such as '{_example(num_blocks, modules)}'"
    try:
        places = [float(part) for part in split.split(",")]
        starts = tuple(math.floor(place) for place in places)
    except (ValueError, OverflowError):
        raise UserError(
            f"config.model.split={split!r}: neither {_WAYS} nor a list of whole numbers; {works}"
        ) from None
    problem = None
    inside = next((place for place in places if place % 1), None)
    if len(starts) != modules:
        problem = f"a list of {len(starts)} first blocks, where config.model.modules={modules}"
    elif starts[0] != 0:
        problem = "the first module must begin at block 0"
    elif inside is not None and inside < num_blocks - 1:
        low = math.floor(inside)
        problem = f"{inside:g} would cut inside block {low}; the nearest places to cut are {low} and {low + 1}"
    elif any(b <= a for a, b in pairwise(starts)):
        problem = "the first blocks must increase"
    elif places[-1] > num_blocks - 1:
        problem = f"no module can begin at {places[-1]:g}: the last block of this network is {num_blocks - 1}, the nearest place to cut"
    if problem:
        raise UserError(f"config.model.split={split!r}: {problem}; {works}")
    return starts


def _example(num_blocks: int, modules: int) -> str:
    return ",".join(map(str, cuts("count", num_blocks, modules)))


def balanced(cost: Callable[[int, int], float], count: int, runs: int) -> tuple[int, ...]:
    """Where each of `runs` consecutive, non-empty runs of `count` things begins, so that the dearest run is as cheap as possible.

    Exact, by dynamic programming over (first things, runs); of equally good cuts the one with longer early runs.

    Args:
      cost: of the run of things `first` up to, not including, `end`; any function, not just a sum of what each thing costs.
      runs: from 1 to `count`.

    Returns:
      The first thing of each run; the first entry is 0.
    """
    if not 1 <= runs <= count:
        raise ValueError(f"{count} things do not make {runs} runs")
    costs = [
        [cost(first, end) if first < end else inf for end in range(count + 1)]
        for first in range(count)
    ]
    best = [0.0] + [inf] * count  # of the things before each place, in so many runs
    begins: list[list[int]] = []
    for made in range(runs):
        longer, begin = [inf] * (count + 1), [0] * (count + 1)
        for end in range(made + 1, count + 1):
            for first in range(made, end):
                worst = max(best[first], costs[first][end])
                if worst <= longer[end]:
                    longer[end], begin[end] = worst, first
        best = longer
        begins.append(begin)
    starts, end = [], count
    for begin in reversed(begins):
        end = begin[end]
        starts.append(end)
    return tuple(reversed(starts))
