"""Tests of the engine `simulated`: equality with `fused`, resume, labels, end and gauges."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import records, same_run, small_config, watch_labels
from test_resume import interrupted

from dgl_jax.config import ReplaySettings
from dgl_jax.engines import SimulatedEngine, SimulatedOptions
from dgl_jax.engines.placement import one_group
from dgl_jax.replay import Ring
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.full_compile

TOTAL = 8


def new_engine(tiny, devices, total=TOTAL, replay=None, **settings) -> SimulatedEngine:
    """Creates an engine with three modules on one device."""
    return SimulatedEngine(
        tiny.spec(),
        one_group(devices[:1], 3),
        total,
        SimulatedOptions(**settings),
        replay or ReplaySettings(3),
    )


def begin(tiny, engine: SimulatedEngine):
    """Returns a fresh state with empty rings."""
    return engine.resume(tiny.place(engine, tiny.init(engine.spec)), None)


def run(tiny, engine: SimulatedEngine, state, until=TOTAL, to_host=None):
    """Returns the final state and the (updates, metrics) of every report."""
    reports = []
    for report in engine.run(state, tiny.source, until):
        assert report.step == min(report.updates)
        reports.append((report.updates, to_host(report.metrics)))
        state = report.snapshot()
    return state, reports


def leaves(to_host, state):
    return jax.tree.leaves(to_host(state.modules))


def equal(to_host, one, other) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in zip(leaves(to_host, one), leaves(to_host, other), strict=True)
    )


@pytest.fixture(scope="module")
def ordered(tiny, devices, to_host):
    engine = new_engine(tiny, devices, replay=ReplaySettings(1), order="ordered")
    return run(tiny, engine, begin(tiny, engine), to_host=to_host)


@pytest.mark.medium
def test_ordered_turns_with_rings_of_one_equal_fused(tiny, ordered, to_host):
    fused, metrics = tiny.run(tiny.engine("fused"), TOTAL)
    state, reports = ordered

    for a, b in zip(leaves(to_host, state), jax.tree.leaves(fused), strict=True):
        np.testing.assert_array_equal(a, b)
    for k in range(3):
        losses = [by_module[k]["loss"] for _, by_module in reports if by_module[k]]
        assert losses == [fused_metrics[k]["loss"] for fused_metrics in metrics]


def test_twin_stale_messages_or_another_order_are_detected(tiny, devices, ordered, to_host):
    drawn = new_engine(tiny, devices)
    assert not equal(to_host, ordered[0], run(tiny, drawn, begin(tiny, drawn), to_host=to_host)[0])
    stale = new_engine(tiny, devices, replay=ReplaySettings(3, "uniform"), order="ordered")
    assert not equal(to_host, ordered[0], run(tiny, stale, begin(tiny, stale), to_host=to_host)[0])


def test_every_module_ends_with_the_same_number_of_updates(tiny, devices, to_host):
    engine = new_engine(tiny, devices, slowdown=(1.0, 3.0, 1.0))
    state, reports = run(tiny, engine, begin(tiny, engine), to_host=to_host)
    assert reports[-1][0] == (TOTAL,) * 3
    assert [int(m.updates) for m in state.modules] == [TOTAL] * 3
    done = [updates for updates, _ in reports if TOTAL in updates[::2] and updates[1] < TOTAL]
    assert done, "the slowed module must finish last, fed by a finished module"
    assert len(reports) == 3 * TOTAL  # one for each update, none for feeding
    for before, (updates, metrics) in zip([(0, 0, 0), *[u for u, _ in reports]], reports):
        assert [b - a for a, b in zip(before, updates)] == [int(bool(m)) for m in metrics]


def test_finished_module_feeds_in_the_configured_mode(tiny, devices, to_host):
    # The last module is slow, so finished modules send most of its messages.
    ends = {}
    for finished in ("train", "eval"):
        engine = new_engine(tiny, devices, slowdown=(1.0, 1.0, 6.0), finished=finished)
        ends[finished], _ = run(tiny, engine, begin(tiny, engine), to_host=to_host)

    first, last = (jax.tree.leaves(to_host(ends["train"].modules[k])) for k in (0, 2))
    first_eval, last_eval = (jax.tree.leaves(to_host(ends["eval"].modules[k])) for k in (0, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, first_eval))
    assert not all(np.array_equal(a, b) for a, b in zip(last, last_eval))


def seen_by_programs(tiny, engine, monkeypatch) -> list[bool]:
    """Checks every message that a program receives.

    Returns:
      For each message, True if its ids and labels are those in the batch that its header names.
    """
    right = watch_labels(monkeypatch, tiny.source)
    for _ in engine.run(begin(tiny, engine), tiny.source, TOTAL):
        pass
    return right


def test_labels_match_their_activations(tiny, devices, monkeypatch):
    right = seen_by_programs(tiny, new_engine(tiny, devices), monkeypatch)
    assert len(right) > 2 * TOTAL - 1
    assert all(right)


def test_twin_labels_of_another_message_are_detected(tiny, devices, monkeypatch):
    add, earlier = Ring.add, {}

    def mixed(self, payload, context, *rest):
        add(self, payload, earlier.get(id(self), context), *rest)
        earlier[id(self)] = context

    monkeypatch.setattr(Ring, "add", mixed)
    assert not all(seen_by_programs(tiny, new_engine(tiny, devices), monkeypatch))


@pytest.mark.parametrize("with_rings", [True, False])
def test_resume_from_snapshot_is_exact_only_with_rings(tiny, devices, to_host, with_rings):
    engine = new_engine(tiny, devices)
    whole, reports = run(tiny, engine, begin(tiny, engine), to_host=to_host)
    state, first = run(tiny, engine, begin(tiny, engine), until=4, to_host=to_host)
    saved = state.flight.snapshot() if with_rings else None
    state = engine.resume(state, saved)
    state, second = run(tiny, engine, state, to_host=to_host)
    assert equal(to_host, whole, state) is with_rings  # twin: without the rings
    assert ([u for u, _ in first + second] == [u for u, _ in reports]) is with_rings


@pytest.mark.parametrize(("at_limit", "lost"), [("wait", False), ("skip", True)])
def test_reuse_limit_waits_or_skips(tiny, devices, to_host, at_limit, lost):
    engine = new_engine(
        tiny,
        devices,
        replay=ReplaySettings(3, max_reuse=1, at_limit=at_limit),
        slowdown=(4.0, 1.0, 1.0),
    )
    state, reports = run(tiny, engine, begin(tiny, engine), to_host=to_host)
    assert reports[-1][0] == (TOTAL,) * 3
    assert bool(state.flight.skipped.any()) is lost
    gauges = engine.gauges(state)
    assert gauges["replay/module_1/reuse"] == gauges["replay/module_2/reuse"] == 1.0


def test_gauges_match_hand_computed_values(tiny, devices, ordered):
    engine = new_engine(tiny, devices, replay=ReplaySettings(1), order="ordered")
    gauges = engine.gauges(ordered[0])
    assert {k: v for k, v in gauges.items() if k.startswith("replay/module_1/")} == {
        "replay/module_1/age": 0.0,
        "replay/module_1/oldest": 0.0,
        "replay/module_1/reuse": 1.0,
        "replay/module_1/never_used": 0.0,
        "replay/module_1/bytes": 8 * (4 * 4 * 4 * 4 + 8),  # 8 examples: 4x4x4 float32, label and id
        "replay/module_1/skipped": 0.0,
        "replay/module_1/ages_from_0": 8.0,
    }


CONFIG = {"engine__name": "simulated", "engine__slowdown": (1.0, 1.5), "replay__size": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("simulated")
    train_and_evaluate(small_config(**CONFIG), workdir)
    return workdir


@pytest.mark.slow
def test_run_records_staleness_and_reuse(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["staleness"][0] == 0
    assert summary["staleness"][1] > 0
    assert summary["reuse"][1] >= 1
    assert [m["updates"] for m in summary["modules"]] == [12, 12]
    assert any("replay/module_1/age" in record for record in records(whole))


@pytest.mark.slow
def test_resume_equals_uninterrupted_run(whole, tmp_path):
    interrupted(tmp_path, 5, small_config(**CONFIG))
    train_and_evaluate(small_config(**CONFIG), tmp_path)
    assert same_run(whole, tmp_path)


@pytest.mark.slow
def test_twin_resume_without_rings_is_inexact_and_warns(whole, tmp_path, caplog):
    config = small_config(**CONFIG, checkpoint__replay_every=0)
    interrupted(tmp_path, 5, config)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        train_and_evaluate(config, tmp_path)
    assert "holds no replay rings" in caplog.text
    assert not same_run(whole, tmp_path)
