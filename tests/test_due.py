"""What is due at which step, and the copies that a continuous engine is evaluated and saved from."""

from types import SimpleNamespace

import numpy as np
import pytest

from dgl_jax.engines import EngineState, Report
from dgl_jax.run.copies import Copies
from dgl_jax.run.due import Due, Events

DUE = Due(log_every=3, evaluate_every=4, save_every=6, total_steps=13)
SAVER = SimpleNamespace(takes_flight=lambda step: step >= 8)


def test_by_hand():
    assert [step for step in range(1, 14) if DUE.log(step)] == [3, 6, 9, 12, 13]
    assert {step: tuple(DUE.at(step)) for step in range(1, 14) if any(DUE.at(step))} == {
        4: (True, False),
        6: (False, True),
        8: (True, False),
        12: (True, True),
        13: (True, True),
    }
    assert [DUE.next_event(step) for step in range(13)] == [
        4,
        4,
        4,
        4,
        6,
        6,
        8,
        8,
        12,
        12,
        12,
        12,
        13,
    ]


def test_every_epoch_by_default():
    each = SimpleNamespace(every=0)
    settings = SimpleNamespace(log=each, eval=SimpleNamespace(every=2), checkpoint=each)
    source = SimpleNamespace(steps_per_epoch=5)
    made = Due.of(SimpleNamespace(settings=settings, source=source, total_steps=9))
    assert made == Due(log_every=5, evaluate_every=2, save_every=5, total_steps=9)


class Workers:
    """Modules that go on while their reports are read."""

    def __init__(self):
        self.copies, self.now, self.copied_flight = Copies(DUE, SAVER), (0, 0), []

    def snapshot(self, flight=True):
        self.copied_flight.append(flight)
        return EngineState(tuple(SimpleNamespace(updates=np.int32(n)) for n in self.now))

    def hear(self, step, before, updates, now=None):
        """Reads a report of `updates` when the modules have come to `now`; gives the updates of a copy, and what it is for."""
        self.now = now or updates
        ready = self.copies.ready(
            Report(updates, ({}, {}), self.snapshot, step=min(updates)), step, before
        )
        return ready and (tuple(int(module.updates) for module in ready[0].modules), ready[1])


def test_a_copy_is_used_at_once_if_it_is_of_the_reports_step():
    workers = Workers()
    assert workers.hear(3, 2, (3, 3)) is None
    assert workers.hear(4, 3, (5, 4)) == ((5, 4), Events(evaluate=True))
    assert workers.hear(4, 4, (6, 4)) is None
    assert workers.copied_flight == [False]


def test_a_copy_that_is_ahead_is_used_under_its_true_step():
    workers = Workers()
    assert workers.hear(6, 5, (6, 6), now=(9, 8)) is None
    assert workers.hear(7, 6, (7, 7), now=(9, 9)) is None
    assert workers.hear(8, 7, (8, 8), now=(9, 9)) == ((9, 8), Events(save=True))
    assert workers.copied_flight == [False], "what comes due while a copy is kept is left out"


def test_no_copy_is_used_while_a_restarted_module_is_behind():
    workers = Workers()
    assert workers.hear(12, 11, (12, 12), now=(12, 6)) is None
    assert workers.hear(12, 12, (13, 6)) is None
    assert workers.hear(12, 12, (13, 11)) is None
    assert workers.hear(12, 12, (13, 12)) == ((13, 12), Events(evaluate=True, save=True))
    assert workers.copied_flight == [True, True], "none while the reports say that it is behind"


@pytest.mark.parametrize("step", [1, 5, 11])
def test_nothing_is_copied_for_nothing(step):
    workers = Workers()
    assert workers.hear(step, step - 1, (step, step)) is None
    assert workers.copied_flight == []
