"""Who works when: the picture in the docstring, and what must hold of every schedule."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax import schedule
from dgl_jax.schedule import Turn, drawn, fused, in_order, pipelined

SIZES = {"modules": st.integers(1, 6), "start": st.integers(0, 20), "count": st.integers(0, 12)}


def plain(tick):
    """The turns of a tick as (module, batch); all of them are steps."""
    assert {turn.kind for turn in tick} == {"step"}
    return [(turn.module, turn.batch) for turn in tick]


def test_three_modules_four_batches():
    expected = [
        [(0, 0)],
        [(1, 0), (0, 1)],
        [(2, 0), (1, 1), (0, 2)],
        [(2, 1), (1, 2), (0, 3)],
        [(2, 2), (1, 3)],
        [(2, 3)],
    ]
    assert [plain(tick) for tick in pipelined(3, 0, 4)] == expected
    picture = [line for line in schedule.__doc__.splitlines() if line.strip().startswith("tick ")]
    assert [
        [(int(k), int(b)) for k, b in re.findall(r"m(\d):b(\d)", line)] for line in picture
    ] == expected


def test_fused_three_modules():
    assert [plain(tick) for tick in fused(3, 5, 7)] == [
        [(0, 5), (1, 5), (2, 5)],
        [(0, 6), (1, 6), (2, 6)],
    ]


def check(ticks, modules, start, count, lag):
    """Every turn once; module k at tick t has batch start + t - lag * k; every packet is made before it is used."""
    found = [turn for tick in ticks for turn in tick]
    assert sorted(found) == [Turn(k, start + b) for k in range(modules) for b in range(count)]
    for t, tick in enumerate(ticks):
        assert all(turn.batch == start + t - lag * turn.module for turn in tick)
    tick_of = {turn: t for t, tick in enumerate(ticks) for turn in tick}
    place = {turn: n for n, turn in enumerate(found)}
    for turn in found:
        if turn.module:
            producer = Turn(turn.module - 1, turn.batch)
            assert place[producer] < place[turn]
            assert tick_of[turn] - tick_of[producer] == lag


@given(**SIZES)
def test_every_module_sees_every_batch_once_and_after_its_producer(modules, start, count):
    check(list(pipelined(modules, start, start + count)), modules, start, count, lag=1)
    check(list(fused(modules, start, start + count)), modules, start, count, lag=0)


@given(**SIZES, after=st.integers(0, 14))
def test_stop_drains_the_pipe(modules, start, count, after):
    for ticks, lag in ((pipelined, 1), (fused, 0)):
        asked = itertools.count()

        def stop(asked=asked):
            return next(asked) >= after

        check(
            list(ticks(modules, start, start + count, stop)), modules, start, min(after, count), lag
        )


def test_stop_is_asked_before_a_batch_enters_and_never_while_draining():
    calls = []
    ticks = list(pipelined(3, 0, 4, lambda: calls.append(0) or len(calls) == 3))
    assert len(calls) == 3
    assert ticks[-1] == (Turn(2, 1),)


def broken_late(modules, start, until):
    """The last module a tick late."""
    for t in range(start, until + modules):
        tick = [
            Turn(k, b)
            for k in reversed(range(modules))
            if start <= (b := t - k - (k == modules - 1)) < until
        ]
        if tick:
            yield tuple(tick)


def broken_order(modules, start, until):
    """The consumer in front of its producer, in the same tick."""
    return (tuple(reversed(tick)) for tick in fused(modules, start, until))


def test_broken_schedules_are_noticed():
    for broken, lag in ((broken_late, 1), (broken_order, 0)):
        try:
            check(list(broken(3, 0, 4)), 3, 0, 4, lag)
        except (AssertionError, KeyError):
            continue
        raise RuntimeError(f"{broken.__name__} passed")


def test_one_after_the_other():
    module = in_order(3)
    assert [module(n) for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_drawn_begins_with_the_warm_up_and_follows_the_slowdown():
    module = drawn(3, (1, 2, 1), seed=5)
    assert [module(n) for n in range(6)] == [0, 0, 1, 1, 2, 2]
    found = [module(n) for n in range(6, 20_006)]
    shares = [found.count(k) / 20_000 for k in range(3)]
    assert shares == pytest.approx([0.4, 0.2, 0.4], abs=0.015)
    assert drawn(3, (), seed=5)(9) in range(3)


def test_a_turn_depends_on_seed_and_number_alone():
    forward = [drawn(4, (), 1)(n) for n in range(50)]
    backward = [drawn(4, (), 1)(n) for n in reversed(range(50))][::-1]
    assert forward == backward
    assert forward != [drawn(4, (), 2)(n) for n in range(50)]
