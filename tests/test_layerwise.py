"""Tests of layer-wise training: a loop by hand, frozen modules, both engines, and reports."""

import dataclasses
import itertools
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from plugin_runs import ByHand, config, furthest, head_loss
from runs import LEAN_VQ
from test_engines import unequal

from dgl_jax import testing
from dgl_jax.config import make_settings, options
from dgl_jax.core.step import forward_step
from dgl_jax.engines import FusedEngine, PipelineEngine
from dgl_jax.engines import base as engines_base
from dgl_jax.engines.dispatches import Dispatches
from dgl_jax.engines.feed import Residence
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.methods.base import Ports
from dgl_jax.methods.layerwise import Layerwise
from dgl_jax.run.build import make_experiment
from dgl_jax.types import nbytes

STEPS = 5
COSINE: dict[str, Any] = {"schedule__name": "cosine", "train__steps": STEPS}
CODED: dict[str, Any] = {
    "method": Layerwise(laps=2),
    "codec": options("codec", name="vq", codes=4, dims=2, codebook_every=3, **LEAN_VQ),
}


# Against a loop in plain JAX


def trained(laps: int = 1, **fields: Any) -> list[Any]:
    """Returns parameters and batch statistics of each module after a small run."""
    fields = COSINE | {"model__modules": 3, "method__laps": laps} | fields
    made = make_experiment(
        make_settings(config(method__name="layerwise", **fields)), jax.devices()[:1]
    )
    *_, last = made.engine.run(made.engine.init(), made.source, made.total_steps)
    return [jax.device_get((m.params, m.batch_stats)) for m in last.snapshot().modules]


@cache
def trained_by_hand(laps: int, frozen: bool = True) -> list[Any]:
    """Trains each module on the features of the modules below it, with steps written out.

    Args:
      laps: number of passes over the modules.
      frozen: False normalizes with batch statistics in the modules below, and updates them.
    """
    hand = ByHand(model__modules=3, **COSINE)
    # Cosine decay over the updates of each module, which therefore restarts at each module.
    hand.optimizer = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(lambda n: 0.025 * (1 + jax.numpy.cos(np.pi * n / STEPS)), momentum=0.9),
    )
    hand.opt_states = [hand.optimizer.init(p) for p in hand.params]

    @partial(jax.jit, static_argnums=0)
    def step(k, p, s, x, label):
        def loss_of(p):
            features, body = hand.modules[k].apply_body(p, s, x, train=True)
            loss, head = head_loss(hand.modules[k], p["objective"], s["objective"], features, label)
            return loss, {"body": body, "objective": head}

        return jax.value_and_grad(loss_of, has_aux=True)(p)

    forward = jax.jit(
        lambda k, p, s, x: hand.modules[k].apply_body(p, s, x, train=not frozen), static_argnums=0
    )
    bounds = [lap * STEPS // laps for lap in range(laps + 1)]
    for begin, end in itertools.pairwise(bounds):
        for k in range(len(hand.modules)):
            for number in range(begin, end):
                x, label = hand.batch(number)
                for below in range(k):
                    x, body = forward(below, hand.params[below], hand.stats[below], x)
                    if not frozen:
                        hand.stats[below] = hand.stats[below] | {"body": body}
                (_, hand.stats[k]), gradient = step(k, hand.params[k], hand.stats[k], x, label)
                hand.update(k, gradient)
    return list(zip(hand.params, hand.stats))


@pytest.mark.slow
@pytest.mark.usefixtures("plugin_kinds")
@pytest.mark.parametrize("laps", [1, 2])
def test_training_equals_loop_in_plain_jax(laps):
    result = trained(laps)
    assert furthest(result, trained_by_hand(laps)) < 1e-6
    # Twins: batch statistics in the modules below, and the other number of laps.
    assert furthest(result, trained_by_hand(laps, frozen=False)) > 1e-3
    assert furthest(result, trained_by_hand(3 - laps)) > 1e-3


@pytest.mark.full_compile
@pytest.mark.slow
def test_method_passes_the_checks_of_testing():
    testing.check_method("layerwise")
    for engine, devices in (("fused", 1), ("pipeline", 2)):
        testing.check_engine(engine, devices, method={"name": "layerwise", "laps": 2})


# Engines on the tiny network


def engine_of(tiny, devices, name: str = "fused", groups=(), method=None, steps=1, **spec):
    """Returns an engine of the tiny network, trained layer by layer.

    Args:
      groups: devices per module of a pipeline.
      method: the method, by default `Layerwise()`.
      steps: ticks per dispatch of `fused`.
      spec: arguments of `tiny.spec`, and `accumulate` and `ema` of the spec.
    """
    changes = {key: spec.pop(key) for key in ("accumulate", "ema") if key in spec}
    made = dataclasses.replace(tiny.spec(**spec), method=method or Layerwise(), **changes)
    modules = len(made.modules)
    if name == "pipeline":
        return PipelineEngine(made, assign(devices, modules, groups or (1,) * modules))
    return FusedEngine(made, one_group(devices[:1], modules), dispatches=Dispatches(steps))


class Thawed(Layerwise):
    """Broken method: forward turns use batch statistics and update the running averages."""

    def program(self, spec, k, kind="step"):
        program = super().program(spec, k, kind)
        if kind != "forward":
            return program

        def forward(state, inbox, context):
            inputs, _ = Ports(spec, k).receive(inbox.below)
            _, stats = forward_step(spec.modules[k], state, inputs, context, train=True)
            return program(dataclasses.replace(state, batch_stats=stats), inbox, context)

        return forward


@pytest.mark.medium
@pytest.mark.parametrize("broken", [False, True], ids=["frozen", "twin"])
def test_finished_modules_do_not_change_by_a_bit(tiny, devices, broken):
    method = Thawed() if broken else Layerwise()
    engine = engine_of(tiny, devices, method=method, ema=0.9)
    engine.total_steps = 6
    after_first, _ = tiny.run(engine, 2)  # 6 of 18 updates: all of module 0
    after_second, _ = tiny.run(engine, 4, after_first)
    end, _ = tiny.run(engine, 6, after_second)
    assert [[int(m.updates) for m in states] for states in (after_first, after_second, end)] == [
        [6, 0, 0],
        [6, 6, 0],
        [6, 6, 6],
    ]
    changed = unequal(after_first[0], end[0]) + unequal(after_second[:2], end[:2])
    # In the twin the average of the statistics stays, because no update follows.
    assert bool(changed) == broken
    assert all("batch_stats" in name and "ema" not in name for name in map(str, changed))
    # Modules that have not trained yet have their initial values.
    for state, new in zip(after_first[1:], tiny.init(engine.spec)[1:]):
        assert not unequal((state.params, state.opt_state), (new.params, new.opt_state))


SPECS: dict[str, dict[str, Any]] = {
    "identity": {"augment": "crop_flip"},
    "bfloat16 and micro-batches": {"dtype": "bfloat16", "accumulate": 2, "ema": 0.9},
    "laps, vq": CODED,
}


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_pipeline_equals_fused_bit_for_bit(tiny, devices, spec):
    fused, reports = tiny.run(engine_of(tiny, devices, **spec), STEPS)
    pipeline = engine_of(tiny, devices, "pipeline", **spec)
    assert not unequal(tiny.run(pipeline, STEPS), (fused, reports))
    assert [int(m.updates) for m in fused] == [STEPS] * 3
    assert len(reports) == 3 * STEPS
    if "codec" in spec:
        # Module 0 sends while module 1 and while module 2 trains, module 1 while module 2 does.
        assert [int(m.extras["sent"]) for m in fused[:2]] == [2 * STEPS, STEPS]
        assert "codec" not in fused[2].extras
    else:
        assert all("sent" not in m.extras for m in fused)


@pytest.mark.slow
def test_reader_gets_each_codebook_that_is_published(tiny, devices, monkeypatch):
    fused, _ = tiny.run(engine_of(tiny, devices, **CODED), STEPS)
    pipeline = engine_of(tiny, devices, "pipeline", **CODED)
    tiny.run(pipeline, STEPS)
    # Module 0 sends 10 messages and publishes before numbers 0, 3, 6 and 9.
    sizes = [nbytes(hop.codebook) for hop in pipeline.hops]
    assert [m.codebooks / size for m, size in zip(pipeline.meters, sizes)] == [4, 2]
    # Twin: counted by batches, which start again at every phase.
    fresh = engines_base.Publisher.fresh
    monkeypatch.setattr(
        engines_base.Publisher,
        "fresh",
        lambda self, codebook, number: fresh(self, codebook, number % STEPS),
    )
    assert unequal(tiny.run(pipeline, STEPS)[0], fused)


@pytest.mark.medium
def test_bytes_are_counted_when_their_batch_is_finished(tiny, devices):
    pipeline = engine_of(tiny, devices, "pipeline", **CODED)
    images = []
    for report in pipeline.run(tiny.place(pipeline, tiny.init(pipeline.spec)), tiny.source, STEPS):
        images.append([meter.images for meter in pipeline.meters])
        _, second, third = report.updates
        # A hop carries every batch that any of the modules above it trains on.
        assert images[-1] == [tiny.batch_size * n for n in (second + third, third)]
    assert images[-1] == [tiny.batch_size * n for n in (2 * STEPS, STEPS)]


@pytest.mark.medium
def test_groups_of_devices_split_the_batch(tiny, devices):
    expected, _ = tiny.run(engine_of(tiny, devices), 1)
    states, _ = tiny.run(engine_of(tiny, devices, "pipeline", groups=(2, 1, 1)), 1)
    assert furthest([s.params for s in states], [s.params for s in expected]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("names", [("fused", "pipeline"), ("pipeline", "fused")], ids="-".join)
@pytest.mark.parametrize("polls", [2, 5, 11], ids=["at a boundary", "in lap 0", "in lap 1"])
def test_stopped_run_resumes_exactly_with_either_engine(tiny, devices, names, polls):
    engine, other = (engine_of(tiny, devices, name, **CODED) for name in names)
    engine.total_steps = other.total_steps = STEPS
    whole, metrics = tiny.run(engine, STEPS)
    answers = iter([False] * polls + [True] * 99)
    states, first = tiny.run(engine, STEPS, stop=lambda: next(answers))
    assert len(first) == sum(int(m.updates) for m in states) == polls
    resumed, rest = tiny.run(other, STEPS, states)
    assert not unequal((resumed, first + rest), (whole, metrics))
    # Twin: without the codebooks that were learned.
    if polls == 11:
        new = tiny.init(engine.spec)
        states = [state.replace(extras=fresh.extras) for state, fresh in zip(states, new)]
        assert unequal(tiny.run(other, STEPS, states)[0], whole)


@pytest.mark.slow
def test_many_steps_per_dispatch_equal_one(tiny, devices):
    spec = {"augment": "crop_flip", "method": Layerwise(2)}
    expected = tiny.run(engine_of(tiny, devices, **spec), 12)
    for mode in ("on", "off"):
        engine = engine_of(tiny, devices, steps=4, **spec)
        engine.residence = Residence(mode)
        assert furthest(tiny.run(engine, 12), expected) < 1e-5
        # Laps of 6 updates: a group of 4 never crosses from one module to the next.
        assert set(engine.loops) == {
            (*((k, "forward") for k in range(m)), (m, "step")) for m in range(3)
        }
    # Twin: other augmentation.
    other = engine_of(tiny, devices, steps=4, **spec | {"augment": "none"})
    assert furthest(tiny.run(other, 12), expected) > 1e-3


@pytest.mark.slow
def test_groups_depend_on_the_counts_alone(tiny, devices):
    engine = engine_of(tiny, devices, steps=4)
    engine.total_steps = 10
    whole, metrics = tiny.run(engine, 10)
    answers = iter([False] * 3 + [True] * 99)
    states, first = tiny.run(engine, 10, stop=lambda: next(answers))
    # Two groups of four, and single updates at the end of module 0 and the start of module 1.
    assert len(first) == 11
    states, rest = tiny.run(engine, 10, states)
    assert not unequal((states, first + rest), (whole, metrics))


@pytest.mark.slow
def test_reports_name_the_module_that_trains(tiny, devices):
    for name in ("fused", "pipeline"):
        engine = engine_of(tiny, devices, name, **CODED)
        engine.total_steps = 2
        state = tiny.place(engine, tiny.init(engine.spec))
        reports = list(engine.run(state, tiny.source, 2))
        assert [(r.step, r.module, r.updates) for r in reports] == [
            (0, 0, (1, 0, 0)),
            (0, 1, (1, 1, 0)),
            (1, 2, (1, 1, 1)),
            (1, 0, (2, 1, 1)),
            (1, 1, (2, 2, 1)),
            (2, 2, (2, 2, 2)),
        ]
        for report in reports:
            losses = ["loss" in metrics for metrics in report.metrics]
            sends = ["codec_error" in metrics for metrics in report.metrics]
            assert losses == [k == report.module for k in range(3)]
            assert sends == [k < report.module for k in range(3)]
