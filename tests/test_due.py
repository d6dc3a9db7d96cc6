"""Schedule of evaluations and checkpoints, and the snapshots of a continuous engine."""

from types import SimpleNamespace

import numpy as np
import pytest

from dgl_jax.engines import EngineState, Report
from dgl_jax.run.copies import Copies
from dgl_jax.run.due import Due, Events

DUE = Due(log_every=3, evaluate_every=4, save_every=6, total_steps=13)
SAVER = SimpleNamespace(takes_flight=lambda step: step >= 8)


def test_events_of_every_step():
    assert [step for step in range(1, 14) if DUE.log(step)] == [3, 6, 9, 12, 13]
    assert {step: tuple(DUE.at(step))[:2] for step in range(1, 14) if any(DUE.at(step))} == {
        4: (True, False),
        6: (False, True),
        8: (True, False),
        12: (True, True),
        13: (True, True),
    }
    next_events = [DUE.next_event(step) for step in range(13)]
    assert next_events == [4] * 4 + [6] * 2 + [8] * 2 + [12] * 4 + [13]


def test_intervals_of_zero_become_one_epoch():
    epoch = SimpleNamespace(every=0)
    settings = SimpleNamespace(log=epoch, eval=SimpleNamespace(every=2), checkpoint=epoch)
    settings.diagnostics = SimpleNamespace(enabled=False, every=200)
    due = Due.of(settings, 5, 9)
    assert due == Due(log_every=5, evaluate_every=2, save_every=5, total_steps=9)


class Workers:
    """Fake continuous engine: its modules train while its reports are read."""

    def __init__(self):
        self.copies, self.counts, self.with_flight = Copies(DUE, SAVER), (0, 0), []

    def snapshot(self, flight=True):
        self.with_flight.append(flight)
        return EngineState(tuple(SimpleNamespace(updates=np.int32(n)) for n in self.counts))

    def report(self, step, before, updates, counts=None):
        """Processes a report of `updates` per module at a time when the modules have made `counts`.

        Returns the update counts of the snapshot that is ready, and its events; None if none is.
        """
        self.counts = counts or updates
        ready = self.copies.ready(
            Report(updates, ({}, {}), self.snapshot, step=min(updates)), step, before
        )
        return ready and (tuple(int(module.updates) for module in ready[0].modules), ready[1])


def test_snapshot_at_the_reported_step_is_used_at_once():
    workers = Workers()
    assert workers.report(3, 2, (3, 3)) is None
    assert workers.report(4, 3, (5, 4)) == ((5, 4), Events(evaluate=True))
    assert workers.report(4, 4, (6, 4)) is None
    assert workers.with_flight == [False]


def test_snapshot_ahead_of_the_reports_waits_for_them():
    workers = Workers()
    assert workers.report(6, 5, (6, 6), counts=(9, 8)) is None
    assert workers.report(7, 6, (7, 7), counts=(9, 9)) is None
    assert workers.report(8, 7, (8, 8), counts=(9, 9)) == ((9, 8), Events(save=True))
    assert workers.with_flight == [False], "events are skipped while a snapshot is held"


def test_no_snapshot_is_used_while_a_restarted_module_is_behind():
    workers = Workers()
    assert workers.report(12, 11, (12, 12), counts=(12, 6)) is None
    assert workers.report(12, 12, (13, 6)) is None
    assert workers.report(12, 12, (13, 11)) is None
    assert workers.report(12, 12, (13, 12)) == ((13, 12), Events(evaluate=True, save=True))
    assert workers.with_flight == [True, True], (
        "no snapshot is taken while the reports show the module behind"
    )


@pytest.mark.parametrize("step", [1, 5, 11])
def test_no_snapshot_is_taken_without_an_event(step):
    workers = Workers()
    assert workers.report(step, step - 1, (step, step)) is None
    assert workers.with_flight == []
