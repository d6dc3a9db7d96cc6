"""Tests of the event simulation: by hand, and against a recurrence for unlimited cores."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgl_jax.schedule import Turn, fused, layerwise, pipelined, staggered
from dgl_jax.tools.timeline import Span, Work, simulate, waiting

# Three modules; a message takes 1 s from the first to the second and 2 s to the third.
THREE = (Work(0, 2.0, 1.0), Work(1, 3.0, 2.0), Work(2, 1.0))
BY_HAND = {
    # module: (begin, end) of each of four batches
    0: [(0, 2), (2, 4), (4, 6), (6, 8)],
    1: [(3, 6), (6, 9), (9, 12), (12, 15)],  # the slowest module never waits after its first turn
    2: [(8, 9), (11, 12), (14, 15), (17, 18)],
}


def times_by_module(spans):
    """Returns a dictionary from module to the (begin, end) of its turns, ordered by batch."""
    times = {}
    for span in sorted(spans):
        times.setdefault(span.module, []).append((span.begin, span.end))
    return times


def test_three_modules_match_hand_calculation():
    spans = simulate(pipelined(3, 0, 4), THREE)
    assert times_by_module(spans) == BY_HAND
    assert [span.end for span in spans] == sorted(span.end for span in spans)
    # Messages to module 1 are sent at 2, 4, 6, 8 and used until 6, 9, 12, 15;
    # messages to module 2 are sent at 6, 9, 12, 15 and used until 9, 12, 15, 18.
    assert [waiting(spans, 1), waiting(spans, 2)] == [3, 1]


@pytest.mark.parametrize("changed", [{"transfer": 0.0}, {"seconds": 2.5}, {"device": 1}])
def test_twin_any_changed_cost_changes_the_timeline(changed):
    assert (
        times_by_module(
            simulate(pipelined(3, 0, 4), (dataclasses.replace(THREE[0], **changed), *THREE[1:]))
        )
        != BY_HAND
    )


def test_host_without_run_ahead_waits_for_each_tick():
    # Each tick waits until the previous one has ended: 0-2, 2-6, 6-9, 9-12, 12-15, 17-18.
    spans = times_by_module(simulate(pipelined(3, 0, 4), THREE, ticks_in_flight=0))
    assert spans == {
        0: [(0, 2), (2, 4), (6, 8), (9, 11)],
        1: [(3, 6), (6, 9), (9, 12), (12, 15)],
        2: [(8, 9), (11, 12), (14, 15), (17, 18)],
    }


def test_link_carries_one_message_at_a_time():
    slow = times_by_module(simulate(pipelined(2, 0, 3), (Work(0, 1.0, 5.0), Work(1, 1.0))))
    assert slow[1] == [(6, 7), (11, 12), (16, 17)]


def test_steps_wait_for_the_message_from_above_of_an_earlier_batch():
    works, ticks = (Work(0, 1.0, 0.5), Work(1, 2.0)), list(staggered(2, 0, 2))
    # Module 1 answers batch 0 at 3.5, and the answer takes half a second.
    waits = times_by_module(simulate(ticks, works, waiting_above=(1, 0)))
    assert waits == {0: [(0, 1), (4, 5)], 1: [(1.5, 3.5), (5.5, 7.5)]}
    free = times_by_module(simulate(ticks, works))
    assert free == {0: [(0, 1), (1, 2)], 1: [(1.5, 3.5), (3.5, 5.5)]}


def test_device_runs_one_turn_at_a_time():
    works = (Work(0, 2.0), Work(0, 3.0))
    assert times_by_module(simulate(fused(2, 0, 2), works)) == {
        0: [(0, 2), (5, 7)],
        1: [(2, 5), (7, 10)],
    }
    # The pipeline dispatches the deeper module first.
    assert times_by_module(simulate(pipelined(2, 0, 2), works)) == {
        0: [(0, 2), (5, 7)],
        1: [(2, 5), (7, 10)],
    }


def test_shared_cores_match_hand_calculation():
    two = (Work(0, 1.0), Work(1, 1.0))
    assert times_by_module(simulate(pipelined(2, 0, 2), two, cores=2)) == {
        0: [(0, 1), (1, 2)],
        1: [(1, 2), (2, 3)],
    }
    # One core: both run at half speed while they overlap.
    assert times_by_module(simulate(pipelined(2, 0, 2), two, cores=1)) == {
        0: [(0, 1), (1, 3)],
        1: [(1, 3), (3, 4)],
    }
    # Turns that use 1.5 cores: full speed alone, two thirds of it together.
    wide = tuple(dataclasses.replace(work, cores=1.5) for work in two)
    assert times_by_module(simulate(pipelined(2, 0, 2), wide, cores=2))[1] == [
        pytest.approx((1, 2.5)),
        pytest.approx((2.5, 3.5)),
    ]


def recurrence(works, batches, ticks_in_flight):
    """Computes the turns of one module per device with unlimited cores, by recurrence.

    Each turn begins at the latest of: end of the previous turn, arrival of the message, end of the
    tick that the host waits for.
    """
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


durations = st.integers(0, 8).map(float)  # sums of whole numbers have no rounding errors


@given(
    st.lists(st.tuples(durations, durations), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_simulation_equals_recurrence(times, batches, ahead):
    works = [Work(k, *each) for k, each in enumerate(times)]
    assert set(
        simulate(pipelined(len(works), 0, batches), works, ticks_in_flight=ahead)
    ) == recurrence(works, batches, ahead)


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=4), st.integers(1, 8))
def test_single_core_is_never_idle(seconds, batches):
    works = [Work(k, s) for k, s in enumerate(seconds)]
    spans = simulate(pipelined(len(works), 0, batches), works, cores=1.0)
    assert max(span.end for span in spans) == pytest.approx(batches * sum(seconds), rel=1e-9)
    assert simulate(pipelined(len(works), 0, batches), works, len(works)) == simulate(
        pipelined(len(works), 0, batches), works
    )


def test_turn_without_a_message_is_an_error():
    with pytest.raises(AssertionError, match="never sent"):
        simulate([(Turn(1, 0),)], THREE)


def test_waiting_matches_hand_calculation():
    sent = [Span(0, b, b, b + 1.0) for b in range(4)]  # one message per second: at 1, 2, 3, 4
    assert waiting(sent, 1) == 4  # no message is ever used
    used = [Span(1, b, 2.0 * b + 1, 2.0 * b + 3) for b in range(4)]  # until 3, 5, 7, 9
    assert waiting(sent + used, 1) == 3
    assert waiting(used, 3) == 0


def test_frozen_modules_forward_the_next_batches_while_a_module_trains():
    works = [Work(k, 3.0) for k in range(3)]  # a forward turn takes 1 s
    phase = list(layerwise([8, 8, 0], 8, 8, overlap=True))
    spans = simulate(phase, works)
    assert spans[-1] == Span(2, 7, 23.0, 26.0)
    steps = [span for span in spans if span.module == 2]
    for step in steps[:4]:
        others = {s.module for s in spans if s.begin < step.end and step.begin < s.end}
        assert others == {0, 1, 2}
    # Twin: without overlap a batch passes all modules before the next one enters.
    alone = simulate(layerwise([8, 8, 0], 8, 8), [Work(0, 3.0)] * 3)
    assert alone[-1].end == 8 * 5.0
