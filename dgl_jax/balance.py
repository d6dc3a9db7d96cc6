"""Consecutive things cut into runs whose largest cost is as small as possible. Plain Python."""

from collections.abc import Callable
from math import inf


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
    costs = [[cost(first, end) if first < end else inf for end in range(count + 1)] for first in range(count)]
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
