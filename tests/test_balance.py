"""The exact cutting of a row: against all cuts there are, and a greedy rule that must lose."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.models.partition import balanced


def dearest(cost, count, starts):
    return max(cost(first, end) for first, end in itertools.pairwise([*starts, count]))


def check(rule, cost, count, runs):
    starts = rule(cost, count, runs)
    assert len(starts) == runs
    assert starts[0] == 0
    assert all(a < b for a, b in itertools.pairwise([*starts, count]))
    every = [(0, *others) for others in itertools.combinations(range(1, count), runs - 1)]
    assert dearest(cost, count, starts) == min(dearest(cost, count, each) for each in every)
    return starts


def of_table(costs):
    """A cost of whole numbers that is no sum: an entry for each (first, end)."""
    return lambda first, end: costs[first][end - first - 1]


rows = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.integers(0, 9), min_size=n - i, max_size=n - i) for i in range(n))
    )
)


@given(rows, st.data())
def test_any_cost(costs, data):
    check(balanced, of_table(costs), len(costs), data.draw(st.integers(1, len(costs))))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_sums(costs, data):
    runs = data.draw(st.integers(1, len(costs)))
    check(balanced, lambda first, end: sum(costs[first:end]), len(costs), runs)


def test_by_hand():
    def rule(costs, runs):
        return balanced(lambda first, end: sum(costs[first:end]), len(costs), runs)

    assert rule([1, 1, 1], 2) == (0, 2)  # equally good: the longer run first
    assert rule([1, 2, 3, 4, 5], 3) == (0, 3, 4)
    assert rule([9, 1, 1, 1], 3) == (0, 1, 3)  # the last run is of use though two would be as good
    assert rule([7], 1) == (0,)


@pytest.mark.parametrize("runs", [0, 4])
def test_runs_are_not_empty(runs):
    with pytest.raises(ValueError, match=f"3 things do not make {runs} runs"):
        balanced(lambda first, end: 1.0, 3, runs)


def greedy(cost, count, runs):
    """Closes a run once it reaches its equal share of the whole."""
    share, starts = cost(0, count) / runs, [0]
    for end in range(1, count):
        if len(starts) < runs and (
            cost(starts[-1], end) >= share or count - end == runs - len(starts)
        ):
            starts.append(end)
    return tuple(starts)


def test_a_greedy_rule_is_noticed():
    lucky, unlucky = [3, 3, 1, 5], [1, 5, 5, 1, 1]  # 6, 6; and 11, 2 where 6, 7 can be had
    check(greedy, lambda first, end: sum(lucky[first:end]), 4, 2)
    with pytest.raises(AssertionError):
        check(greedy, lambda first, end: sum(unlucky[first:end]), 5, 2)
