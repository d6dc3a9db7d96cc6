"""Diagnostics under every engine and kind of method: they change no number of a run."""

import pytest
from probed_runs import ASYNCHRONOUS, config, ours, unchanged
from runs import records, small_config
from test_resume import interrupted

from dgl_jax.train import train_and_evaluate

# Probes at steps 0, 5, 10 and 12: the run stops at 5 and 10 for nothing else.
APART = {"diagnostics__every": 5}
RUNS = {
    "pipeline,vq,adam,ema": APART
    | {
        "engine__name": "pipeline",
        **{"codec__name": "vq", "codec__dims": 2, "codec__codes": 4, "codec__codebook_every": 6},
        **{"optimizer__name": "adam", "train__ema": 0.5},
    },
    "backprop,dispatches": {
        "method__name": "backprop",
        **{"engine__steps_per_dispatch": 4, "eval__every": 7, "checkpoint__every": 9},
    },
    "simulated,vq": ASYNCHRONOUS,
    "layerwise": {"method__name": "layerwise"},
    "ddg,int8": APART | {"method__name": "ddg", "codec__name": "int8"},
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
    every = name not in ("backprop,dispatches", "ddg,int8", "dni")  # the others have one objective
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


@pytest.mark.slow
def test_stopped_asynchronous_run_resumes_exactly(tmp_path):
    settings = config(**ASYNCHRONOUS)
    train_and_evaluate(settings, tmp_path / "whole")
    interrupted(tmp_path / "stopped", 6, settings)
    train_and_evaluate(settings, tmp_path / "stopped")
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    assert ours(tmp_path / "whole")[3]["diagnostics/module_1/staleness"] >= 0
