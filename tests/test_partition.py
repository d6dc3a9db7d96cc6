import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts, cuts


def sizes(starts, num_blocks):
    return [b - a for a, b in zip(starts, [*starts[1:], num_blocks])]


def check_count(split, num_blocks, modules):
    starts = split("count", num_blocks, modules)
    got = sizes(starts, num_blocks)
    assert starts[0] == 0
    assert len(starts) == modules
    assert sum(got) == num_blocks
    assert min(got) >= 1
    assert max(got) - min(got) <= 1
    assert got == sorted(got, reverse=True)


networks = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(networks)
def test_count(network):
    check_count(cuts, *network)


@pytest.mark.parametrize(
    "broken",
    [
        lambda split, n, k: tuple(
            min(i * -(-n // k), n - 1) for i in range(k)
        ),  # as large as possible, the rest last
        lambda split, n, k: tuple(i * n // k for i in range(k)),  # larger ones anywhere
    ],
)
def test_count_notices_other_rules(broken):
    with pytest.raises(AssertionError):
        check_count(broken, 7, 5)


def test_count_by_hand():
    assert cuts("count", 6, 4) == (0, 2, 4, 5)
    assert cuts("count", 6, 6) == (0, 1, 2, 3, 4, 5)
    assert cuts("count", 4, 1) == (0,)


@given(networks, st.data())
def test_list(network, data):
    num_blocks, modules = network
    others = st.sets(st.integers(1, num_blocks - 1), min_size=modules - 1, max_size=modules - 1)
    starts = (0, *sorted(data.draw(others if num_blocks > 1 else st.just(set()))))
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
            "no module can begin at 9: the last block of this network is 5, the nearest place to cut",
        ),
        ("0,2,5.5", 3, "no module can begin at 5.5"),
        ("0,2.5,4", 3, "2.5 would cut inside block 2; the nearest places to cut are 2 and 3"),
        ("0,nan,2", 3, "neither"),
        ("0,inf,2", 3, "neither"),
        ("0,a,2", 3, "neither"),
        ("", 3, "neither"),
    ],
)
def test_bad_lists(split, modules, reason):
    with pytest.raises(UserError) as error:
        cuts(split, 6, modules)
    assert f"config.model.split={split!r}: " in str(error.value)
    assert reason in str(error.value)
    assert "'0,2,4'" in str(error.value)  # what would work


@pytest.mark.parametrize("split", ["count", "0,1,2,3,4,5,6"])
@pytest.mark.parametrize("modules", [0, 7])
def test_more_modules_than_blocks(split, modules):
    with pytest.raises(UserError, match=f"config.model.modules={modules}: .*1 to 6 would work"):
        cuts(split, 6, modules)


# Balanced splits

integers = st.integers(0, 9)
random_costs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.lists(integers, min_size=n, max_size=n),) * 3)
)


def brute_force(costs, modules):
    """The least cost of the slowest module over all cuts there are, written out: a first block, inner blocks, a head."""
    return min(
        slowest(costs, (0, *others))
        for others in itertools.combinations(range(1, len(costs[0])), modules - 1)
    )


def slowest(costs, starts):
    first, inner, head = costs
    spans = [range(a, b) for a, b in itertools.pairwise([*starts, len(head)])]
    return max(
        sum(first[i] if i == span[0] else inner[i] for i in span) + head[span[-1]] for span in spans
    )


def check_balanced(rule, costs, modules):
    assert slowest(costs, rule(BlockCosts(*costs), modules)) == brute_force(costs, modules)


def exact(costs, modules, split="flops"):
    return cuts(split, len(costs.head), modules, lambda: costs)


@given(random_costs, st.data())
def test_balanced_splits_are_optimal(costs, data):
    check_balanced(exact, costs, data.draw(st.integers(1, len(costs[0]))))


def headless(costs, modules):
    """Balances the bodies alone."""
    return exact(BlockCosts(costs.first, costs.inner, (0,) * len(costs.head)), modules)


def equal_first(costs, modules):
    """Takes a block to cost the same wherever it is."""
    return exact(BlockCosts(costs.inner, costs.inner, costs.head), modules)


def greedy(costs, modules):
    """Ends a module at its equal share of the whole."""
    count = len(costs.head)
    share, starts = costs.module(0, count) / modules, [0]
    for end in range(1, count):
        if len(starts) < modules and (
            costs.module(starts[-1], end) >= share or count - end == modules - len(starts)
        ):
            starts.append(end)
    return tuple(starts)


@pytest.mark.parametrize(
    ("broken", "costs"),
    [
        (greedy, ([1, 5, 5, 1, 1], [1, 5, 5, 1, 1], [0] * 5)),
        (headless, ([2, 2, 2, 2], [2, 2, 2, 2], [0, 9, 1, 0])),
        (equal_first, ([2, 0, 2], [2, 6, 3], [0, 0, 0])),
    ],
)
def test_rules_that_are_not_optimal_are_noticed(broken, costs):
    check_balanced(exact, costs, 2)
    with pytest.raises(AssertionError):
        check_balanced(broken, costs, 2)


def test_costs_are_asked_for_where_they_matter():
    def unwanted():
        raise RuntimeError

    assert cuts("count", 4, 2, unwanted) == (0, 2)
    assert cuts("0,1", 4, 2, unwanted) == (0, 1)
    with pytest.raises(UserError, match="1 to 4 would work"):  # before anything is measured
        cuts("time", 4, 5, unwanted)
    with pytest.raises(ValueError, match="a split by time needs the costs"):
        cuts("time", 4, 2)
    costs = BlockCosts((1.0, 1.0, 1.0, 3.0), (1.0, 1.0, 1.0, 3.0), (0.0,) * 4)
    assert exact(costs, 2, "time") == exact(costs, 2, "flops") == (0, 3)
