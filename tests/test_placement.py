"""Tests of device placement, shared devices, and moves that never alias host memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.config import ReplaySettings
from dgl_jax.engines import EngineInputs
from dgl_jax.engines.placement import assign, check_batch, layout, one_group
from dgl_jax.engines.transfer import put
from dgl_jax.errors import UserError
from dgl_jax.types import Batch


def ids(placement):
    return [[device.id for device in group.devices.flat] for group in placement.groups]


@pytest.mark.parametrize(
    ("count", "modules", "sizes", "costs", "expected"),
    [
        (4, 4, (), (), [[0], [1], [2], [3]]),
        (4, 2, (), (), [[0, 1], [2, 3]]),
        (4, 3, (), (), [[0], [1], [2]]),  # one device stays idle
        (4, 1, (), (), [[0, 1, 2, 3]]),
        (1, 3, (), (), [[0], [0], [0]]),
        (2, 4, (), (), [[0], [0], [1], [1]]),
        (2, 4, (), (1, 1, 1, 5), [[0], [0], [0], [1]]),
        (2, 4, (), (5, 1, 1, 1), [[0], [1], [1], [1]]),
        (3, 4, (), (4, 4, 1, 1), [[0], [1], [2], [2]]),
        (4, 3, (1, 2, 1), (), [[0], [1, 2], [3]]),
        (4, 2, (1, 1), (), [[0], [1]]),
        (4, 3, (1, 2, 1), (9, 1, 1), [[0], [1, 2], [3]]),
    ],
)
def test_assign_distributes_devices(devices, count, modules, sizes, costs, expected):
    placement = assign(devices[:count], modules, sizes, costs)
    assert ids(placement) == expected
    assert placement.count() == len({i for group in expected for i in group})
    for hop in range(modules - 1):
        assert placement.crosses(hop) == (expected[hop] != expected[hop + 1])


@pytest.mark.parametrize(
    ("modules", "sizes", "words"),
    [
        (3, (1, 1), ["config.engine.group_sizes=(1, 1)", "there are 3"]),
        (
            3,
            (1, 2, 2),
            [
                "config.engine.group_sizes=(1, 2, 2)",
                "needs 5 devices",
                "there are 4",
                "--cpu_devices",
            ],
        ),
    ],
)
def test_invalid_group_sizes_are_refused(devices, modules, sizes, words):
    with pytest.raises(UserError) as error:
        assign(devices, modules, sizes)
    assert [word for word in words if word not in str(error.value)] == []


def test_one_group_places_all_modules_on_it(devices):
    placement = one_group(devices[:2], 3)
    assert ids(placement) == [[0, 1]] * 3
    assert placement.count() == 2
    assert not placement.crosses(0)
    assert "module 2 on 0,1" in placement.describe()


def test_layout_returns_device_ranges():
    assert layout(8, 2) == [range(4), range(4, 8)]
    assert layout(5, 3, (1, 2, 1)) == [range(1), range(1, 3), range(3, 4)]
    assert layout(3, 4, (), (9.0, 1.0, 1.0, 1.0)) == [
        range(1),
        range(1, 2),
        range(1, 2),
        range(2, 3),
    ]


# Moves


def aligned(values):
    """Returns a copy that starts at a multiple of 64 bytes.

    XLA's CPU client may use such memory in place.
    """
    values = np.asarray(values)
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[:] = values
    return array


def test_put_copies_host_arrays(devices):
    for sharding in (one_group(devices[:1], 1).replicated(0), one_group(devices, 1).split(0)):
        source = aligned(np.arange(64, dtype=np.float32))
        moved = jax.block_until_ready(put({"a": source}, sharding))["a"]
        source[:] = -1
        np.testing.assert_array_equal(moved, np.arange(64))
        assert moved.sharding == sharding


def test_twin_plain_device_put_aliases(devices):
    source = aligned(np.arange(64, dtype=np.float32))
    moved = jax.block_until_ready(jax.device_put(source, one_group(devices[:1], 1).replicated(0)))
    source[:] = -1
    assert not np.array_equal(moved, np.arange(64)), (
        "this platform does not alias, so put() need not copy any more"
    )


def test_put_moves_between_groups_in_both_directions(devices):
    placement = assign(devices, 2)
    x = put(np.arange(8.0, dtype=np.float32), placement.split(0))
    there = put(x, placement.split(1))
    back = put(there, placement.replicated(0))
    assert {d.id for d in there.devices()} == {2, 3}
    assert {d.id for d in back.devices()} == {0, 1}
    np.testing.assert_array_equal(back, np.arange(8))
    assert [s.data.shape for s in there.addressable_shards] == [(4,), (4,)]
    assert [s.data.shape for s in back.addressable_shards] == [(8,), (8,)]


def test_put_regroups_arrays_between_devices_without_the_host(devices):
    values = np.arange(24, dtype=np.float32).reshape(12, 2)
    # Number of parts that the examples are split into on the devices of a group.
    parts = {"split": lambda n: len(n), "replicated": lambda n: 1}
    for here, there in (
        ([0], [1, 2]),
        ([1, 2], [0]),
        ([0, 1], [1, 2, 3]),
        ([1, 2, 3], [0]),
        ([0, 1], [2, 3]),
        ([0, 1, 2, 3], [1]),
    ):
        groups = [one_group([devices[n] for n in numbers], 1) for numbers in (here, there)]
        for before, after in itertools.product(parts, repeat=2):
            x = jax.block_until_ready(put(values, getattr(groups[0], before)(0)))
            target = getattr(groups[1], after)(0)
            with jax.transfer_guard("disallow"):
                moved = put(
                    {"payload": x, "whole": [x]},
                    {"payload": target, "whole": groups[1].replicated(0)},
                )
            assert moved["payload"].sharding == target
            assert moved["whole"][0].sharding == groups[1].replicated(0)
            rows = 12 // parts[after](there)
            for shard in moved["payload"].addressable_shards:
                first = rows * there.index(shard.device.id) if after == "split" else 0
                np.testing.assert_array_equal(shard.data, values[first : first + rows])
            np.testing.assert_array_equal(moved["whole"][0], values)
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)
    moved = put(
        {"keys": put(keys, one_group(devices[:2], 1).split(0)), "count": jnp.int32(7)},
        one_group(devices[2:3], 1).replicated(0),
    )
    assert moved["keys"].dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(moved["keys"]), jax.random.key_data(keys))
    assert int(moved["count"]) == 7


def test_put_batch_splits_examples(devices):
    batch = Batch(
        np.zeros((8, 2, 2, 3), np.uint8),
        {"label": np.arange(8), "id": np.arange(8) + 100},
        np.int32(7),
    )
    with jax.transfer_guard("disallow"):
        moved = assign(devices, 2).put_batch(batch, 1)
    assert [s.data.shape for s in moved.inputs.addressable_shards] == [(4, 2, 2, 3)] * 2
    assert [s.data.tolist() for s in moved.context["id"].addressable_shards] == [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
    ]
    assert [s.data.tolist() for s in moved.step.addressable_shards] == [7, 7]


def test_check_batch_refuses_indivisible_batches(devices):
    sizes = assign(devices, 2, (1, 3)).sizes()
    assert sizes == [1, 3]
    check_batch(9, sizes)
    with pytest.raises(
        UserError,
        match=r"batch_size=8: not divisible by the 3 devices of module_1; 9 would do",
    ):
        check_batch(8, sizes)
    with pytest.raises(UserError, match="3 devices of module_0; 30 would do"):
        check_batch(16, [3, 5])


def test_idle_devices_are_logged(tiny, devices, caplog):
    caplog.set_level("INFO", "dgl_jax")
    inputs = EngineInputs(tiny.spec(), devices, ReplaySettings(), total_steps=1)
    assert inputs.placed((2, 1, 1)).count() == 4
    assert not caplog.messages
    assert inputs.placed(()).count() == 3
    assert caplog.messages == ["1 of 4 devices stay idle; config.engine.group_sizes can use them"]
