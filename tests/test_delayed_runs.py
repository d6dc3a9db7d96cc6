"""Methods with delayed gradients under both engines: equal bits, resuming, messages and bytes."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from delayed import BATCH, SOURCE, STEPS, make_engine, make_spec, params_of, train
from plugin_runs import equal, furthest
from runs import LEAN_VQ, arrays, records, small_config

from dgl_jax import testing
from dgl_jax.config import make_settings, options
from dgl_jax.engines import EngineState, PipelineEngine
from dgl_jax.methods.ddg import Ddg
from dgl_jax.methods.fdg import Fdg
from dgl_jax.methods.features_replay import FeaturesReplay
from dgl_jax.tools.plan import plan
from dgl_jax.train import train_and_evaluate

METHODS = {"ddg": Ddg(), "features_replay": FeaturesReplay(), "fdg": Fdg()}
VQ = options("codec", name="vq", codes=4, dims=2, codebook_every=3, **LEAN_VQ)
NAMES = pytest.mark.parametrize("name", METHODS)


def leaves(state: EngineState) -> list[np.ndarray]:
    return [
        np.asarray(x)
        for m in state.modules
        for x in jax.tree.leaves(m.replace(rng=jax.random.key_data(m.rng)))
    ]


def same(one: EngineState, other: EngineState) -> bool:
    return equal(leaves(one), leaves(other))


def moved(state: EngineState, engine: Any) -> EngineState:
    """Returns a state, restored from host copies as from a checkpoint, on an engine's devices."""

    def copied(x: Any) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(np.array(jax.random.key_data(x)), impl="threefry2x32")
        return np.array(x)

    return engine.resume(EngineState(jax.tree.map(copied, state.modules)), None)


# Engines


@pytest.mark.slow
@pytest.mark.full_compile
@NAMES
def test_pipeline_equals_fused_and_resumes_its_state_bit_for_bit(name):
    """Stops with messages in flight and continues under the other engine and in both orders."""
    # Codebooks take most of the time to compile, and no method treats them differently.
    spec = make_spec(METHODS[name], codec=VQ if name == "ddg" else "int8", ema=0.5)
    whole = train(make_engine(spec))
    halves = [train(make_engine(spec, devices), 3) for devices in (1, 3)]
    assert same(*halves)
    updates = [int(module.updates) for module in halves[0].modules]
    assert updates[0] == 3 < updates[1] < updates[2]
    assert furthest(params_of(halves[0]), params_of(whole)) > 1e-3
    for half, devices in zip(halves, (3, 1), strict=True):
        engine = make_engine(spec, devices)
        assert same(train(engine, STEPS, moved(half, engine)), whole)
    # Twin: without the gradients in flight the resumed run differs.
    lost = tuple(
        m.replace(extras=m.extras | {"above": jax.tree.map(lambda x: 0 * x, m.extras["above"])})
        if "above" in m.extras
        else m
        for m in halves[1].modules
    )
    engine = make_engine(spec)
    assert not same(train(engine, STEPS, moved(EngineState(lost), engine)), whole)


@pytest.mark.medium
@NAMES
def test_groups_of_several_devices_train_alike(name):
    spec = make_spec(METHODS[name], modules=2)
    params = params_of(train(make_engine(spec)))
    for groups in ((2, 2), (1, 2)):
        assert furthest(params_of(train(make_engine(spec, groups))), params) < 1e-5


@NAMES
def test_turns_of_different_modules_are_dispatched_side_by_side(name):
    """Compares the order of the turns with the schedule, in whose ticks most modules work."""
    engine = make_engine(make_spec(METHODS[name]), 3)
    log: list[tuple[int, str]] = []
    for turn in [(k, kind) for k in range(3) for kind in ("forward", "backward", "step")]:
        if (turn[1] == "step") == (turn[0] == 2):
            program = engine.programs[turn]

            def logged(*arguments: Any, turn: Any = turn, program: Any = program) -> Any:
                log.append(turn)
                return program(*arguments)

            engine.programs[turn] = logged
    train(engine)
    ticks = list(METHODS[name].schedule([0] * 3, STEPS, STEPS, overlap=True))
    assert log == [(turn.module, turn.kind) for tick in ticks for turn in tick]
    busy = [len({turn.module for turn in tick}) for tick in ticks[4:-6]]
    assert min(busy) >= 2 if name != "fdg" else set(busy) == {3}


@pytest.mark.medium
def test_dispatches_of_many_steps_equal_single_ones():
    settings = {"method__name": "fdg", "train__steps": 12, "model__modules": 2}

    def trained(steps: int) -> list[Any]:
        config = small_config(engine__steps_per_dispatch=steps, **settings)
        made = testing.make_experiment(make_settings(config), jax.devices()[:1])
        *_, last = made.engine.run(made.engine.init(), made.source, 12)
        return params_of(last.snapshot())

    assert furthest(trained(3), trained(1)) < 1e-5


# Messages and bytes


@pytest.mark.medium
@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("codec", ["identity", "int8", "vq"])
def test_bytes_are_counted_in_both_directions(codec, encode, monkeypatch):
    sent: dict[str, int] = {"up": 0, "down": 0}
    original = PipelineEngine._move

    def counted(self: Any, k: int, number: int, message: Any, context: Any) -> Any:
        moved, moved_context = original(self, k, number, message, context)
        book = codec == "vq" and number % 3 == 0 and (encode or context is not None)
        tree = (moved.payload, moved_context, moved.codebook if book else ())
        direction = "down" if context is None else "up"
        sent[direction] += sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        return moved, moved_context

    monkeypatch.setattr(PipelineEngine, "_move", counted)
    codec_options = VQ if codec == "vq" else codec
    spec = make_spec(FeaturesReplay(encode), modules=2, codec=codec_options)
    engine = make_engine(spec, 2, total=6)
    train(engine, 6)
    measured, simulated = engine.traffic(), spec.traffic()
    assert measured.measured
    assert not simulated.measured
    features, context = 8, 8  # values of the activations, and bytes of label and id
    payload = {"identity": 4 * features, "int8": features + 2 * 4, "vq": features // 2 * 2 // 8}
    book = 4 * 4 * 2 * 4 / 3 / BATCH if codec == "vq" else 0.0  # four groups, every third message
    up = payload[codec] + context + book
    down = payload[codec] + book if encode else 4 * features
    for traffic in (measured, simulated):
        np.testing.assert_allclose(traffic.wire, [up + down])
        np.testing.assert_allclose(traffic.down, [down])
        np.testing.assert_allclose(traffic.raw, [2 * 4 * features + context])
    assert sent == {"up": round(up * BATCH * 6), "down": round(down * BATCH * 6)}
    assert simulated.gauges()["wire/module_0/bytes_down_per_image"] == simulated.down[0]


@pytest.mark.medium
def test_gradients_have_a_codec_and_metrics_of_their_own():
    spec = make_spec(Ddg(), modules=2, codec=VQ)
    *reports, _ = make_engine(spec).run(spec_state(spec), SOURCE, STEPS)
    for report in reports:
        lower, upper = (set(metrics) for metrics in report.metrics)
        assert {"codec_error", "codec_perplexity"} < lower
        assert {"loss", "gradient_codec_error", "gradient_codec_perplexity"} <= upper
        assert 0 < float(report.metrics[1]["gradient_codec_error"]) < 2
    raw = make_spec(Ddg(encode_gradients=False), modules=2, codec=VQ)
    assert "gradient_codec" not in raw.abstract_states()[1].extras
    encoded, unchanged = params_of(train(make_engine(spec))), params_of(train(make_engine(raw)))
    assert furthest(encoded, unchanged) > 1e-4


def spec_state(spec: Any) -> EngineState:
    return make_engine(spec).init()


# Whole runs

RUN: dict[str, Any] = {
    "model__modules": 3,
    "train__steps": 8,
    "eval__every": 3,
    "checkpoint__every": 3,
    "checkpoint__keep": 9,
    "log__every": 2,
}


@pytest.mark.slow
@NAMES
def test_resumed_run_equals_uninterrupted_run(name, tmp_path):
    fields = RUN | {"method__name": name, "codec__name": "int8", "codec__dims": 2}
    summary = train_and_evaluate(small_config(**fields), tmp_path / "whole")
    assert [module["updates"] for module in summary.modules] == [8] * 3
    assert summary.wire_bytes_down_per_image
    assert summary.ensemble_accuracy == summary.modules[-1]["test_accuracy"]
    train_and_evaluate(small_config(**fields), tmp_path / "stopped")
    for step in (6, 8):  # the newest checkpoints are lost
        remove(tmp_path / "stopped" / "checkpoints" / str(step))
    (tmp_path / "stopped" / "summary.json").unlink()
    train_and_evaluate(small_config(**fields), tmp_path / "stopped")
    one, other = tmp_path / "whole", tmp_path / "stopped"
    assert equal(arrays(one), arrays(other))
    assert records(one) == records(other)
    logged = [line for line in records(one) if "train/module_2/loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    assert all("train/module_0/codec_error" in line for line in logged)
    assert all("train/module_1/gradient_codec_error" in line for line in logged)
    json.dumps(summary.to_dict())


def remove(path: Path) -> None:
    assert path.is_dir()
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()


@NAMES
def test_plan_predicts_a_pipeline(name):
    config = small_config(method__name=name, model__modules=4, engine__name="pipeline")
    numbers, spans = plan(make_settings(config), devices=4, stated="9,9,9,1", cores=8)
    # A forward pass takes a third of an update. Only the last module has the time of a head.
    assert numbers["modules"][3]["milliseconds"] < 12
    assert numbers["ticks_per_second"] == pytest.approx(1000 / (9 + 3), rel=0.02)
    begins = sorted((span.begin, span.end, span.module) for span in spans)
    overlapping = [a for a, b in itertools.pairwise(begins) if b[0] < a[1]]
    assert len(overlapping) > len(begins) / 2


@pytest.mark.full_compile
@pytest.mark.slow
@NAMES
def test_methods_pass_the_checks_of_testing(name):
    testing.check_method(name)
