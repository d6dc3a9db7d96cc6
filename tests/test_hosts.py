"""Parts of runs of several processes that need only one: layouts, moves, shares of the data."""

import socket
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from test_launch import fails

from dgl_jax.data import Shard
from dgl_jax.data.shares import Absent, Share, facts
from dgl_jax.engines import world
from dgl_jax.engines.placement import Placement, layout, one_group
from dgl_jax.engines.program import elsewhere, jitted
from dgl_jax.engines.transfer import distribute, is_here, moves, put_rows
from dgl_jax.errors import UserError
from dgl_jax.types import Batch, Inbox


class Device(NamedTuple):
    """Stands for a device of some process."""

    process_index: int
    id: int


class Devices(NamedTuple):
    """Stands for a sharding over devices."""

    device_set: frozenset


def group(*processes):
    """Returns a group with a device of each process, or several of one that is repeated."""
    devices = [Device(process, i) for i, process in enumerate(processes)]
    return SimpleNamespace(size=len(devices), all=devices)


class Groups(Placement):
    """Placement on devices of processes that do not exist."""

    def processes(self, module):
        return sorted({device.process_index for device in self.groups[module].all})

    def split(self, module):
        return Devices(frozenset((module, *d) for d in self.groups[module].all))


@pytest.mark.parametrize(
    ("count", "per_process", "modules", "sizes"),
    [
        (6, 0, 4, [1, 1, 1, 1]),  # one process: 6 // 4
        (6, 2, 3, [2, 2, 2]),  # a process each
        (8, 2, 2, [4, 4]),  # two processes each
        (12, 2, 4, [2, 2, 2, 2]),  # 3 devices are not whole processes
        (6, 3, 3, [1, 1, 1]),  # 2 devices would cross the border of a process
        (8, 4, 3, [2, 2, 2]),  # parts of a process
        (8, 4, 4, [2, 2, 2, 2]),
    ],
)
def test_groups_end_at_the_borders_of_processes(count, per_process, modules, sizes):
    assert [len(part) for part in layout(count, modules, per_process=per_process)] == sizes


def test_moves_are_inside_one_process_or_between_separate_ones():
    def over(*devices):
        return Devices(frozenset(Device(*device) for device in devices))

    first, second = over((0, 0), (0, 1)), over((1, 2), (1, 3))
    assert moves(first, first) == "here"
    assert moves(over((0, 0)), over((0, 1))) == "here"
    assert moves(first, second) == "cross"
    assert moves(first, over((0, 1), (1, 2))) == "mixed"
    assert moves(over((0, 0), (1, 2)), over((0, 1), (1, 3))) == "mixed"


def test_neighbors_are_the_first_processes_of_adjacent_modules():
    placement = Groups((group(0, 1), group(2, 3), group(4), group(4)))
    assert [placement.neighbors(process) for process in range(5)] == [[2], [], [0, 4], [], [2]]


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([(0,), (0, 1)], r"module_0 and module_1 lie on processes \[0\] and \[0, 1\]"),
        ([(0, 0), (1,)], r"module_0 has 2 devices and module_1 1, on processes \[0\] and \[1\]"),
        # The first hop stays inside a process, but evaluation sends its predictions to the last.
        ([(0, 0), (0,), (1,)], r"module_0 has 2 devices and module_2 1"),
        ([(0,), (1,)], r"processes \[2\] have no module; start 2 processes"),
    ],
)
def test_layouts_that_jax_cannot_move_are_refused_by_name(groups, problem, monkeypatch):
    monkeypatch.setattr(
        "dgl_jax.engines.placement.moves",
        lambda a, b: moves(
            *(Devices(frozenset(Device(*d[1:]) for d in s.device_set)) for s in (a, b))
        ),
    )
    monkeypatch.setattr(jax, "process_count", lambda: 3 if len(groups) == 2 else 2)
    placement = Groups(tuple(group(*processes) for processes in groups))
    with pytest.raises(UserError, match=problem):
        placement.check_processes()


def test_movable_layouts_are_accepted(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("dgl_jax.engines.placement.moves", lambda a, b: "cross")
    Groups((group(0), group(1))).check_processes()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_absent_source_describes_the_batches_of_the_real_one(tiny, split):
    source = tiny.source
    absent = Absent(facts(source, tiny.batch_size))
    real, shapes = list(source.evaluation(split)), list(absent.evaluation(split))
    assert len(shapes) == len(real)
    for one, other in zip([*real, source.batch(0)], [*shapes, absent.batch(0)]):
        assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), one) == jax.tree.map(
            lambda x: (x.shape, str(x.dtype)), other
        )
    assert absent.examples(split) == source.examples(split)
    assert absent.steps_per_epoch == source.steps_per_epoch


def test_the_shares_of_all_processes_make_up_the_batch(tiny):
    count = 4
    shares = [Share(tiny.source, Shard(i, count)) for i in range(count)]
    whole = tiny.source.batch(3)
    for name in ("id", "label"):
        parts = [share.batch(3).context[name] for share in shares]
        assert [len(part) for part in parts] == [tiny.batch_size // count] * count
        np.testing.assert_array_equal(np.concatenate(parts), whole.context[name])
    second = next(shares[1].batches(3)).context["id"]
    np.testing.assert_array_equal(second, np.split(whole.context["id"], count)[1])
    assert shares[0].steps_per_epoch == tiny.source.steps_per_epoch


def test_rows_and_whole_arrays_are_placed_as_put_places_them(tiny):
    placement = one_group(jax.devices()[:1], 1)
    batch = tiny.source.batch(0)
    split, whole = placement.split(0), placement.replicated(0)
    rows = put_rows(batch, Batch(split, split, whole), 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, rows, batch))
    assert jax.tree.all(jax.tree.map(np.array_equal, distribute(batch, whole), batch))
    shapes = jax.eval_shape(lambda x: x, batch)
    absent = put_rows(shapes, Batch(split, split, whole), 2)
    assert not any(map(is_here, jax.tree.leaves(absent)))
    assert absent.inputs.shape == batch.inputs.shape
    assert absent.inputs.sharding == split


def test_a_stand_in_sends_what_the_program_sends(tiny):
    spec, placement = tiny.spec(2), one_group(jax.devices()[:1], 2)
    states = spec.init()
    batch = placement.put_batch(tiny.source.batch(0), 0)
    inbox = Inbox(batch, None)
    stand_in = elsewhere(spec, 0, placement)
    state, sent, metrics = stand_in(states[0], inbox, batch.context)
    assert state is states[0]
    assert metrics == {}
    _, real, _ = jitted(spec, 0, placement)(states[0], inbox, batch.context)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), sent) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )
    assert not any(map(is_here, jax.tree.leaves(sent)))


def test_the_own_address_is_the_one_towards_the_coordinator():
    assert world.own_address("127.0.0.1") == "127.0.0.1"
    assert world.own_address("localhost").startswith("127.")
    socket.inet_aton(world.own_address(socket.gethostname()))
    with pytest.raises(UserError, match=r"--coordinator: no\.such\.host"):
        world.own_address("no.such.host.invalid")


def test_a_run_of_one_process_needs_no_service():
    assert world.exchange({"a": 1}) == [{"a": 1}]
    assert world.from_first(lambda: (1, 2)) == (1, 2)
    assert world.merged({"a": 1}) == {"a": 1}
    world.barrier()
    with world.together():
        pass
    assert world.count() == 1


@pytest.mark.parametrize("address", ["10.0.0.1", ":8000", "host:port"])
def test_an_invalid_coordinator_is_refused(address):
    with pytest.raises(UserError, match="must be host:port"):
        world.join(address, 2, 0)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--process_id=1",), "--process_id=1: applies only with --distributed"),
        (("--distributed", "--mode=eval"), "--distributed: applies to --mode=train"),
        (
            ("--distributed", "--coordinator=127.0.0.1:8000"),
            "--num_processes, --process_id: missing",
        ),
        (
            (
                "--distributed",
                "--coordinator=127.0.0.1:8000",
                "--num_processes=2",
                "--process_id=2",
            ),
            "--process_id=2: must be less than --num_processes=2",
        ),
    ],
)
def test_flags_of_several_processes_belong_together(flags, message, tmp_path):
    assert message in fails("--config=configs/digits.py", f"--workdir={tmp_path}", *flags)
