"""Tests of the schedules: the picture in the docstring, and properties of every schedule."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax import schedule
from dgl_jax.schedule import Turn, drawn, fused, in_order, layerwise, pipelined, staggered

SIZES = {"modules": st.integers(1, 6), "start": st.integers(0, 20), "count": st.integers(0, 12)}


def plain(tick):
    """Returns the turns of a tick as (module, batch), after checking that all are steps."""
    assert {turn.kind for turn in tick} == {"step"}
    return [(turn.module, turn.batch) for turn in tick]


def test_pipelined_schedule_equals_the_picture_in_the_docstring():
    expected = [
        [(0, 0)],
        [(1, 0), (0, 1)],
        [(2, 0), (1, 1), (0, 2)],
        [(2, 1), (1, 2), (0, 3)],
        [(2, 2), (1, 3)],
        [(2, 3)],
    ]
    assert [plain(tick) for tick in pipelined(3, 0, 4)] == expected
    assert pictures()[:6] == expected


def pictures():
    """Returns the turns of all lines of the pictures in the docstring, as (module, batch)."""
    lines = [line for line in schedule.__doc__.splitlines() if line.strip().startswith("tick ")]
    return [[(int(k), int(b)) for k, b in re.findall(r"m(\d):b(\d)", line)] for line in lines]


def test_staggered_schedule_equals_the_picture_in_the_docstring():
    expected = [
        [(0, 0)],
        [(1, 0)],
        [(2, 0), (0, 1)],
        [(1, 1)],
        [(2, 1), (0, 2)],
        [(1, 2)],
        [(2, 2)],
    ]
    assert [plain(tick) for tick in staggered(3, 0, 3)] == expected
    assert pictures()[6:] == expected


@given(**SIZES)
def test_staggered_modules_read_what_neighbors_sent_one_tick_before(modules, start, count):
    ticks = list(staggered(modules, start, start + count))
    turns = [turn for tick in ticks for turn in tick]
    assert sorted(turns) == [Turn(k, start + b) for k in range(modules) for b in range(count)]
    tick_of = {turn: t for t, tick in enumerate(ticks) for turn in tick}
    for k, batch, _ in turns:
        if k:
            assert tick_of[Turn(k, batch)] == tick_of[Turn(k - 1, batch)] + 1
            # The answer to batch b arrives before module k - 1 works on batch b + 1.
            following = tick_of.get(Turn(k - 1, batch + 1))
            assert following in (None, tick_of[Turn(k, batch)] + 1)


@given(**SIZES, after=st.integers(0, 14))
def test_stopped_staggered_schedule_finishes_the_batches_in_flight(modules, start, count, after):
    polls = iter(range(100))
    ticks = list(staggered(modules, start, start + count, lambda: next(polls) >= after))
    turns = sorted(turn for tick in ticks for turn in tick)
    ended = start + min(count, after)
    assert turns == [Turn(k, b) for k in range(modules) for b in range(start, ended)]


def lettered(ticks):
    """Returns each tick as (module, letter of the kind, batch)."""
    letters = {"step": "b", "forward": "f"}
    return [[(turn.module, letters[turn.kind], turn.batch) for turn in tick] for tick in ticks]


def test_layerwise_schedule_equals_the_picture_in_the_docstring():
    expected = {
        False: [
            [(0, "b", 0)],
            [(0, "b", 1)],
            [(0, "f", 0), (1, "b", 0)],
            [(0, "f", 1), (1, "b", 1)],
            [(0, "f", 0), (1, "f", 0), (2, "b", 0)],
            [(0, "f", 1), (1, "f", 1), (2, "b", 1)],
        ],
        True: [
            [(0, "b", 0)],
            [(0, "b", 1)],
            [(0, "f", 0)],
            [(1, "b", 0), (0, "f", 1)],
            [(1, "b", 1)],
            [(0, "f", 0)],
            [(1, "f", 0), (0, "f", 1)],
            [(2, "b", 0), (1, "f", 1)],
            [(2, "b", 1)],
        ],
    }
    for overlap, ticks in expected.items():
        assert lettered(layerwise([0] * 3, 2, 2, overlap=overlap)) == ticks
    lines = schedule.__doc__.splitlines()
    rows = lines[next(n for n, line in enumerate(lines) if "phase 0" in line) :]
    column = rows[0].rindex("m0")  # the right half of the picture starts here
    for overlap, ticks in expected.items():
        halves = [row[column:] if overlap else row[:column] for row in rows]
        turns = [re.findall(r"m(\d):([bf])(\d)", half) for half in halves]
        assert [[(int(k), kind, int(b)) for k, kind, b in row] for row in turns if row] == ticks


def updates_of(ticks):
    """Returns the module and the batch of every update, in order."""
    return [(turn.module, turn.batch) for tick in ticks for turn in tick if turn.updates()]


@given(
    modules=st.integers(1, 4),
    total=st.integers(1, 9),
    laps=st.integers(1, 4),
    parts=st.lists(st.integers(0, 9), max_size=3),
    polls=st.integers(0, 20),
    overlap=st.booleans(),
)
def test_layerwise_trains_in_phases_and_continues_anywhere(
    modules, total, laps, parts, polls, overlap
):
    bounds = [lap * total // laps for lap in range(laps + 1)]
    expected = [
        (k, batch)
        for begin, end in itertools.pairwise(bounds)
        for k in range(modules)
        for batch in range(begin, end)
    ]
    counts, made, asked = [0] * modules, [], itertools.count()
    steps = sorted({min(part, total) for part in parts} | {total})
    stops = [lambda: next(asked) >= polls, *[lambda: False] * len(steps)]
    for until, stop in zip([steps[0], *steps], stops):
        ticks = list(layerwise(counts, until, total, laps, stop, overlap))
        for tick in ticks:
            (update,) = [turn for turn in tick if turn.updates()] or [None]
            deepest = max(turn.module for turn in tick)
            assert update is None or update.module == deepest
        new = updates_of(ticks)
        # All modules below have just forwarded the batch of every update.
        forwarded = [(t.module, t.batch) for tick in ticks for t in tick if not t.updates()]
        assert sorted(forwarded) == sorted((j, b) for k, b in new for j in range(k))
        for k, _ in new:
            counts[k] += 1
        made += new
        if stop is not stops[0]:
            assert sum(counts) == max(until * modules, sum(counts) - len(new))
    assert made == expected


def test_fused_schedule_gives_all_modules_the_same_batch():
    assert [plain(tick) for tick in fused(3, 5, 7)] == [
        [(0, 5), (1, 5), (2, 5)],
        [(0, 6), (1, 6), (2, 6)],
    ]


def check(ticks, modules, start, count, lag):
    """Checks a schedule in which each module lags its producer by `lag` ticks.

    Every turn must occur once, module k must have batch start + t - lag * k at tick t, and every
    message must be sent before it is read.
    """
    turns = [turn for tick in ticks for turn in tick]
    assert sorted(turns) == [Turn(k, start + b) for k in range(modules) for b in range(count)]
    for t, tick in enumerate(ticks):
        assert all(turn.batch == start + t - lag * turn.module for turn in tick)
    tick_of = {turn: t for t, tick in enumerate(ticks) for turn in tick}
    position = {turn: n for n, turn in enumerate(turns)}
    for turn in turns:
        if turn.module:
            producer = Turn(turn.module - 1, turn.batch)
            assert position[producer] < position[turn]
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


def test_stop_is_called_before_a_batch_enters_and_not_while_draining():
    calls = []
    ticks = list(pipelined(3, 0, 4, lambda: calls.append(0) or len(calls) == 3))
    assert len(calls) == 3
    assert ticks[-1] == (Turn(2, 1),)


def broken_late(modules, start, until):
    """Yields the pipelined schedule with the last module one tick late."""
    for t in range(start, until + modules):
        tick = [
            Turn(k, b)
            for k in reversed(range(modules))
            if start <= (b := t - k - (k == modules - 1)) < until
        ]
        if tick:
            yield tuple(tick)


def broken_order(modules, start, until):
    """Yields the fused schedule with each consumer before its producer."""
    return (tuple(reversed(tick)) for tick in fused(modules, start, until))


def test_twin_broken_schedules_fail():
    for broken, lag in ((broken_late, 1), (broken_order, 0)):
        try:
            check(list(broken(3, 0, 4)), 3, 0, 4, lag)
        except (AssertionError, KeyError):
            continue
        raise RuntimeError(f"{broken.__name__} passed")


def test_turns_in_order_repeat_all_modules():
    module = in_order(3)
    assert [module(n) for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_drawn_turns_start_with_every_module_twice_and_follow_the_slowdown():
    module = drawn(3, (1, 2, 1), seed=5)
    assert [module(n) for n in range(6)] == [0, 0, 1, 1, 2, 2]
    modules = [module(n) for n in range(6, 20_006)]
    shares = [modules.count(k) / 20_000 for k in range(3)]
    assert shares == pytest.approx([0.4, 0.2, 0.4], abs=0.015)
    assert drawn(3, (), seed=5)(9) in range(3)


def test_drawn_turn_depends_on_seed_and_number_only():
    forward = [drawn(4, (), 1)(n) for n in range(50)]
    backward = [drawn(4, (), 1)(n) for n in reversed(range(50))][::-1]
    assert forward == backward
    assert forward != [drawn(4, (), 2)(n) for n in range(50)]
