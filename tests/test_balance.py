"""Tests of the exact linear partitioning, against all possible cuts and a greedy twin."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.models.partition import balanced


def largest_cost(cost, count, starts):
    cuts = itertools.pairwise([*starts, count])
    return max(cost(first, end, number) for number, (first, end) in enumerate(cuts))


def check(rule, cost, count, segments):
    starts = rule(cost, count, segments)
    assert len(starts) == segments
    assert starts[0] == 0
    assert all(a < b for a, b in itertools.pairwise([*starts, count]))
    every = [(0, *later) for later in itertools.combinations(range(1, count), segments - 1)]
    best = min(largest_cost(cost, count, each) for each in every)
    assert largest_cost(cost, count, starts) == best
    return starts


def from_table(costs):
    """Returns a cost function that need not be a sum and depends on the number of the segment."""
    return lambda first, end, number: costs[first][end - first - 1] * (1 + number % 3)


rows = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.integers(0, 9), min_size=n - i, max_size=n - i) for i in range(n))
    )
)


@given(rows, st.data())
def test_partition_is_optimal_for_any_cost(costs, data):
    check(balanced, from_table(costs), len(costs), data.draw(st.integers(1, len(costs))))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_partition_is_optimal_for_sums(costs, data):
    segments = data.draw(st.integers(1, len(costs)))
    check(balanced, lambda first, end, _: sum(costs[first:end]), len(costs), segments)


def test_partition_equals_values_by_hand():
    def rule(costs, segments):
        return balanced(lambda first, end, _: sum(costs[first:end]), len(costs), segments)

    assert rule([1, 1, 1], 2) == (0, 2)  # of equally good cuts, the longer segment is first
    assert rule([1, 2, 3, 4, 5], 3) == (0, 3, 4)
    assert rule([9, 1, 1, 1], 3) == (0, 1, 3)  # three segments, although two would cost the same
    assert rule([7], 1) == (0,)


@pytest.mark.parametrize("segments", [0, 4])
def test_empty_segments_are_refused(segments):
    with pytest.raises(
        ValueError, match=f"3 items cannot be cut into {segments} non-empty segments"
    ):
        balanced(lambda *_: 1.0, 3, segments)


def greedy(cost, count, segments):
    """Ends a segment when it reaches its equal share of the total cost."""
    share, starts = cost(0, count, 0) / segments, [0]
    for end in range(1, count):
        if len(starts) < segments and (
            cost(starts[-1], end, 0) >= share or count - end == segments - len(starts)
        ):
            starts.append(end)
    return tuple(starts)


def test_twin_greedy_rule_fails():
    # The greedy segments cost 6 and 6, which is optimal; then 11 and 2 instead of 6 and 7.
    lucky, unlucky = [3, 3, 1, 5], [1, 5, 5, 1, 1]
    check(greedy, lambda first, end, _: sum(lucky[first:end]), 4, 2)
    with pytest.raises(AssertionError):
        check(greedy, lambda first, end, _: sum(unlucky[first:end]), 5, 2)
