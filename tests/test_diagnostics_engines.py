"""Diagnostics under every engine and kind of method: they change no number of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probed_runs import config, ours, unchanged
from runs import records, small_config
from test_resume import interrupted

from dgl_jax.config import make_settings
from dgl_jax.core import rngs
from dgl_jax.run.build import make_experiment
from dgl_jax.train import train_and_evaluate

# Probes at steps 0, 5, 10 and 12: the run stops at 5 and 10 for nothing else.
APART = {"diagnostics__every": 5}
RUNS = {
    "pipeline,vq": APART
    | {
        "engine__name": "pipeline",
        **{"codec__name": "vq", "codec__dims": 2, "codec__codes": 4, "codec__codebook_every": 6},
    },
    "pipeline,int8,adam,ema": APART
    | {
        "engine__name": "pipeline",
        **{"codec__name": "int8", "codec__dims": 2, "optimizer__name": "adam", "train__ema": 0.5},
    },
    "backprop,dispatches": {
        "method__name": "backprop",
        **{"engine__steps_per_dispatch": 4, "eval__every": 7, "checkpoint__every": 9},
    },
    "simulated,vq": {
        "engine__name": "simulated",
        "engine__slowdown": (1.0, 2.0),
        "replay__size": 3,
        **{"codec__name": "vq", "codec__dims": 2, "codec__codes": 4},
    },
    "layerwise": {"method__name": "layerwise"},
    "ddg": APART | {"method__name": "ddg"},
    "dni": APART | {"method__name": "dni"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_probes_change_no_number_of_any_engine_and_method(name, tmp_path):
    train_and_evaluate(small_config(**RUNS[name]), tmp_path / "plain")
    train_and_evaluate(config(**RUNS[name]), tmp_path / "probed")
    assert unchanged(tmp_path / "plain", tmp_path / "probed")
    lines = ours(tmp_path / "probed")
    apart = [0, 5, 10, 12] if RUNS[name].items() >= APART.items() else [0, 4, 8, 12]
    steps = [0, 7, 9, 12] if name == "backprop,dispatches" else apart
    assert [line["step"] for line in lines[:4]] == steps
    gradients = {key for key in lines[0] if key.endswith("gradient_squared")}
    every = name not in ("backprop,dispatches", "ddg", "dni")  # the others have one objective
    assert len(gradients) == (2 if every else 1)
    last = lines[3]
    if name == "layerwise":  # from step 6 on, module 0 is frozen and module 1 trains
        drifts = [line["diagnostics/module_1/mmd"] for line in lines[1:4]]
        assert drifts[0] > 0 < drifts[1]
        assert drifts[2] == 0
        final = [line for line in ours(tmp_path / "probed") if "final/module_1/mmd" in line]
        # All updates of module 1 read the outputs of the frozen module 0.
        assert final[-1]["final/module_1/weighted_drift"] == 0
    if name == "simulated,vq":
        assert last["diagnostics/module_1/staleness"] >= 0
    if "vq" in name or "int8" in name:
        assert 0 < last["diagnostics/module_1/codec_error"] < 1


@pytest.mark.medium
def test_probe_before_training_starts_the_codebook(tmp_path):
    """Compares the error of the first probe with a codebook started on its first batch."""
    # k-means++ draws with weights that are rounded differently in different programs.
    vq = {"codec__name": "vq", "codec__dims": 2, "codec__codes": 4, "codec__start": "sample"}
    train_and_evaluate(config(diagnostics__batches=2, **vq), tmp_path)
    experiment = make_experiment(make_settings(config(**vq)))
    spec, source = experiment.spec, experiment.source
    (module, state), root = (spec.modules[0], spec.init()[0]), rngs.probe(rngs.root(spec.seed))
    codec, book = spec.codec, state.extras["codec"]

    @jax.jit
    def sent(inputs):
        inputs = spec.task.evaluate(inputs)
        outputs, _ = module.apply_body(state.params, state.batch_stats, inputs, {}, train=True)
        key = rngs.codec(rngs.module(root, 0), 0)
        return outputs, codec.codebook(codec.publish(book, key, outputs, jnp.zeros((), jnp.int32)))

    outputs, books = zip(*(sent(source.batch(number).inputs) for number in range(2)))
    errors = []
    for x in outputs:
        difference = codec.decode(books[0], codec.encode(books[0], x)) - x
        errors.append(float(jnp.linalg.norm(difference) / jnp.linalg.norm(x)))
    measured = ours(tmp_path)[0]["diagnostics/module_1/codec_error"]
    assert measured == pytest.approx(np.mean(errors), rel=1e-4)
    assert 0.05 < np.mean(errors) < 0.8  # with an empty codebook it would be 1


@pytest.mark.slow
def test_stopped_asynchronous_run_resumes_exactly(tmp_path):
    settings = config(**RUNS["simulated,vq"])
    train_and_evaluate(settings, tmp_path / "whole")
    interrupted(tmp_path / "stopped", 6, settings)
    train_and_evaluate(settings, tmp_path / "stopped")
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    assert ours(tmp_path / "whole")[3]["diagnostics/module_1/staleness"] >= 0


@pytest.mark.slow
def test_threads_run_with_probes(tmp_path):
    train_and_evaluate(config(engine__name="threads", replay__size=2), tmp_path)
    lines = ours(tmp_path)
    assert lines[0]["step"] == 0
    assert any("diagnostics/module_1/mmd" in line for line in lines)
    final = [line for line in lines if "final/module_1/mmd" in line]
    assert final[-1]["final/module_1/mmd"] == 0
