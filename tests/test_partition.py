"""Tests of the partition of a network into modules: by count, by a list, and by costs."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts, cuts


def sizes(starts, num_blocks):
    return [b - a for a, b in zip(starts, [*starts[1:], num_blocks])]


def check_count(rule, num_blocks, modules):
    starts = rule("count", num_blocks, modules)
    blocks = sizes(starts, num_blocks)
    assert starts[0] == 0
    assert len(starts) == modules
    assert sum(blocks) == num_blocks
    assert min(blocks) >= 1
    assert max(blocks) - min(blocks) <= 1
    assert blocks == sorted(blocks, reverse=True)


networks = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(networks)
def test_split_by_count_has_equal_sizes_with_larger_modules_first(network):
    check_count(cuts, *network)


@pytest.mark.parametrize(
    "broken",
    [
        lambda split, n, k: tuple(min(i * -(-n // k), n - 1) for i in range(k)),
        lambda split, n, k: tuple(i * n // k for i in range(k)),
    ],
    ids=["small module last", "larger modules anywhere"],
)
def test_twin_other_rules_of_count_fail(broken):
    with pytest.raises(AssertionError):
        check_count(broken, 7, 5)


def test_split_by_count_equals_values_by_hand():
    assert cuts("count", 6, 4) == (0, 2, 4, 5)
    assert cuts("count", 6, 6) == (0, 1, 2, 3, 4, 5)
    assert cuts("count", 4, 1) == (0,)


@given(networks, st.data())
def test_split_by_list_returns_the_list(network, data):
    num_blocks, modules = network
    later = st.sets(st.integers(1, num_blocks - 1), min_size=modules - 1, max_size=modules - 1)
    starts = (0, *sorted(data.draw(later if num_blocks > 1 else st.just(set()))))
    assert cuts(",".join(map(str, starts)), num_blocks, modules) == starts
    assert cuts(" , ".join(map(str, starts)), num_blocks, modules) == starts


@pytest.mark.parametrize(
    ("split", "modules", "reason"),
    [
        ("0,2", 3, "a list of 2"),
        ("0,1,2,3", 3, "a list of 4"),
        ("1,2,3", 3, "block 0"),
        ("-1,2,3", 3, "block 0"),
        ("0,3,3", 3, "increase"),
        ("0,3,2", 3, "increase"),
        ("0,2,6", 3, "last block of this network is 5"),
        (
            "0,2,9",
            3,
            "no module can begin at 9: the last block of this network is 5, the nearest place",
        ),
        ("0,2,5.5", 3, "no module can begin at 5.5"),
        ("0,2.5,4", 3, "2.5 would cut inside block 2; the nearest places to cut are 2 and 3"),
        ("0,nan,2", 3, "neither"),
        ("0,inf,2", 3, "neither"),
        ("0,a,2", 3, "neither"),
        ("", 3, "neither"),
    ],
)
def test_invalid_lists_are_refused(split, modules, reason):
    with pytest.raises(UserError) as error:
        cuts(split, 6, modules)
    assert f"config.model.split={split!r}: " in str(error.value)
    assert reason in str(error.value)
    assert "'0,2,4'" in str(error.value)  # the message shows a valid list


@pytest.mark.parametrize("split", ["count", "0,1,2,3,4,5,6"])
@pytest.mark.parametrize("modules", [0, 7])
def test_more_modules_than_blocks_are_refused(split, modules):
    with pytest.raises(UserError, match=f"config.model.modules={modules}: .*1 to 6 would work"):
        cuts(split, 6, modules)


# Balanced splits

integers = st.integers(0, 9)
random_costs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.lists(integers, min_size=n, max_size=n),) * 2, rows(n))
)


def rows(n):
    """Returns one row of costs of heads, or one per module."""
    row = st.lists(integers, min_size=n, max_size=n)
    return st.lists(row, min_size=1, max_size=1) | st.lists(row, min_size=n, max_size=n)


def brute_force(costs, modules):
    """Returns the least cost of the slowest module over all possible cuts."""
    return min(
        slowest(costs, (0, *later))
        for later in itertools.combinations(range(1, len(costs[0])), modules - 1)
    )


def slowest(costs, starts):
    first, inner, heads = costs
    spans = [range(a, b) for a, b in itertools.pairwise([*starts, len(first)])]
    return max(
        sum(first[i] if i == span[0] else inner[i] for i in span)
        + heads[min(number, len(heads) - 1)][span[-1]]
        for number, span in enumerate(spans)
    )


def check_balanced(rule, costs, modules):
    assert slowest(costs, rule(BlockCosts(*costs), modules)) == brute_force(costs, modules)


def exact(costs, modules, split="flops"):
    return cuts(split, len(costs.first), modules, lambda: costs)


@given(random_costs, st.data())
def test_balanced_splits_are_optimal(costs, data):
    check_balanced(exact, costs, data.draw(st.integers(1, len(costs[0]))))


def headless(costs, modules):
    """Ignores the costs of the heads."""
    return exact(BlockCosts(costs.first, costs.inner, ((0,) * len(costs.first),)), modules)


def equal_first(costs, modules):
    """Ignores that a block costs less as the first one of a module."""
    return exact(BlockCosts(costs.inner, costs.inner, costs.heads), modules)


def equal_heads(costs, modules):
    """Ignores that the heads of the modules differ."""
    return exact(BlockCosts(costs.first, costs.inner, costs.heads[1:2]), modules)


def greedy(costs, modules):
    """Ends a module when it reaches its equal share of the total cost."""
    count = len(costs.first)
    share, starts = costs.module(0, count, 0) / modules, [0]
    for end in range(1, count):
        if len(starts) < modules and (
            costs.module(starts[-1], end, 0) >= share or count - end == modules - len(starts)
        ):
            starts.append(end)
    return tuple(starts)


@pytest.mark.parametrize(
    ("broken", "costs"),
    [
        (greedy, ([1, 5, 5, 1, 1], [1, 5, 5, 1, 1], [[0] * 5])),
        (headless, ([2, 2, 2, 2], [2, 2, 2, 2], [[0, 9, 1, 0]])),
        (equal_first, ([2, 0, 2], [2, 6, 3], [[0, 0, 0]])),
        (equal_heads, ([1, 1, 1], [1, 1, 1], [[9, 1, 9], [1, 9, 1], [9, 9, 9]])),
    ],
)
def test_twin_rules_that_are_not_optimal_fail(broken, costs):
    check_balanced(exact, costs, 2)
    with pytest.raises(AssertionError):
        check_balanced(broken, costs, 2)


def test_costs_are_computed_only_if_the_split_needs_them():
    def unwanted():
        raise RuntimeError

    assert cuts("count", 4, 2, unwanted) == (0, 2)
    assert cuts("0,1", 4, 2, unwanted) == (0, 1)
    with pytest.raises(UserError, match="1 to 4 would work"):  # before anything is measured
        cuts("time", 4, 5, unwanted)
    with pytest.raises(ValueError, match="a split by time needs the costs"):
        cuts("time", 4, 2)
    costs = BlockCosts((1.0, 1.0, 1.0, 3.0), (1.0, 1.0, 1.0, 3.0), ((0.0,) * 4,))
    assert exact(costs, 2, "time") == exact(costs, 2, "flops") == (0, 3)
