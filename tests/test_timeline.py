"""Turns in time: by hand, and against the recurrence that they follow where no core is shared."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.schedule import Turn, fused, pipelined
from dgl_jax.tools.timeline import Span, Work, simulate, waiting

# Three modules; the packets of the first take 1 s to the second, those of the second 2 s to the third.
THREE = (Work(0, 2.0, 1.0), Work(1, 3.0, 2.0), Work(2, 1.0))
BY_HAND = {
    # module: (begin, end) of each of four batches
    0: [(0, 2), (2, 4), (4, 6), (6, 8)],
    1: [(3, 6), (6, 9), (9, 12), (12, 15)],  # from now on the slowest one never waits
    2: [(8, 9), (11, 12), (14, 15), (17, 18)],
}


def of(spans):
    """{module: its turns, by batch}."""
    found = {}
    for span in sorted(spans):
        found.setdefault(span.module, []).append((span.begin, span.end))
    return found


def test_three_modules_four_batches_by_hand():
    spans = simulate(pipelined(3, 0, 4), THREE)
    assert of(spans) == BY_HAND
    assert [span.end for span in spans] == sorted(span.end for span in spans)
    # Packets for module 1 are made at 2, 4, 6, 8 and used up at 6, 9, 12, 15; for module 2 at 6, 9, 12, 15 and 9, 12, 15, 18.
    assert [waiting(spans, 1), waiting(spans, 2)] == [3, 1]


@pytest.mark.parametrize("changed", [{"transfer": 0.0}, {"seconds": 2.5}, {"device": 1}])
def test_what_is_left_out_is_noticed(changed):
    assert (
        of(simulate(pipelined(3, 0, 4), (dataclasses.replace(THREE[0], **changed), *THREE[1:])))
        != BY_HAND
    )


def test_a_host_that_does_not_run_ahead():
    # Each tick waits for the whole one before: 0-2, 2-6, 6-9, 9-12, 12-15, 17-18.
    spans = of(simulate(pipelined(3, 0, 4), THREE, ticks_in_flight=0))
    assert spans == {
        0: [(0, 2), (2, 4), (6, 8), (9, 11)],
        1: [(3, 6), (6, 9), (9, 12), (12, 15)],
        2: [(8, 9), (11, 12), (14, 15), (17, 18)],
    }


def test_a_link_carries_one_packet_after_the_other():
    slow = of(simulate(pipelined(2, 0, 3), (Work(0, 1.0, 5.0), Work(1, 1.0))))
    assert slow[1] == [(6, 7), (11, 12), (16, 17)]


def test_one_device_does_one_thing_at_a_time():
    works = (Work(0, 2.0), Work(0, 3.0))
    assert of(simulate(fused(2, 0, 2), works)) == {0: [(0, 2), (5, 7)], 1: [(2, 5), (7, 10)]}
    # Dispatched as a pipeline: the deeper module first.
    assert of(simulate(pipelined(2, 0, 2), works)) == {0: [(0, 2), (5, 7)], 1: [(2, 5), (7, 10)]}


def test_devices_that_share_cores_by_hand():
    two = (Work(0, 1.0), Work(1, 1.0))
    assert of(simulate(pipelined(2, 0, 2), two, cores=2)) == {
        0: [(0, 1), (1, 2)],
        1: [(1, 2), (2, 3)],
    }
    # One core: in the middle both work at half speed.
    assert of(simulate(pipelined(2, 0, 2), two, cores=1)) == {
        0: [(0, 1), (1, 3)],
        1: [(1, 3), (3, 4)],
    }
    # Turns that keep 1.5 cores busy: alone at full speed, together at two thirds.
    wide = tuple(dataclasses.replace(work, cores=1.5) for work in two)
    assert of(simulate(pipelined(2, 0, 2), wide, cores=2))[1] == [
        pytest.approx((1, 2.5)),
        pytest.approx((2.5, 3.5)),
    ]


def recurrence(works, batches, ticks_in_flight):
    """A module a device, all cores its own: each turn begins with the last of what it needs."""
    end, arrival, done = {}, {}, []
    spans = set()
    for tick in pipelined(len(works), 0, batches):
        t = len(done) - 1 - ticks_in_flight
        for k, batch, _ in tick:
            begin = max(
                end.get((k, batch - 1), 0.0),
                arrival.get((k, batch), 0.0),
                done[t] if t >= 0 else 0.0,
            )
            end[k, batch] = begin + works[k].seconds
            sent = max(end[k, batch], arrival.get((k + 1, batch - 1), 0.0))
            arrival[k + 1, batch] = sent + works[k].transfer
            spans.add(Span(k, batch, begin, end[k, batch]))
        done.append(max([end[turn[:2]] for turn in tick] + done[-1:]))
    return spans


durations = st.integers(0, 8).map(float)  # sums of whole numbers are exact


@given(
    st.lists(st.tuples(durations, durations), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_equals_the_recurrence(times, batches, ahead):
    works = [Work(k, *each) for k, each in enumerate(times)]
    assert set(
        simulate(pipelined(len(works), 0, batches), works, ticks_in_flight=ahead)
    ) == recurrence(works, batches, ahead)


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=4), st.integers(1, 8))
def test_one_core_is_never_idle(seconds, batches):
    works = [Work(k, s) for k, s in enumerate(seconds)]
    spans = simulate(pipelined(len(works), 0, batches), works, cores=1.0)
    assert max(span.end for span in spans) == pytest.approx(batches * sum(seconds), rel=1e-9)
    assert simulate(pipelined(len(works), 0, batches), works, len(works)) == simulate(
        pipelined(len(works), 0, batches), works
    )


def test_a_schedule_that_never_makes_a_packet_is_an_error():
    with pytest.raises(AssertionError, match="never made"):
        simulate([(Turn(1, 0),)], THREE)


def test_waiting_by_hand():
    made = [Span(0, b, b, b + 1.0) for b in range(4)]  # a packet a second
    assert waiting(made, 1) == 4  # nobody takes any
    used = [
        Span(1, b, 2.0 * b + 1, 2.0 * b + 3) for b in range(4)
    ]  # every two seconds, from 1 on: gone at 3, 5, 7, 9
    assert waiting(made + used, 1) == 3  # made at 1, 2, 3, 4; one is gone at 3
    assert waiting(used, 3) == 0
