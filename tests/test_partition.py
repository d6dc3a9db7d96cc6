import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.errors import UserError
from dgl_jax.models import cuts


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
        lambda split, n, k: tuple(min(i * -(-n // k), n - 1) for i in range(k)),  # as large as possible, the rest last
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
        ("flops", 3, "neither"),
        ("0,a,2", 3, "neither"),
        ("", 3, "neither"),
        ("0,1.5,2", 3, "neither"),
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
