"""Diagnostics under every kind of method: they change no number of a run."""

import pytest
from probed_runs import EXAMPLES, VQ, config, ours, unchanged
from runs import small_config

from dgl_jax.train import train_and_evaluate


def trained(folder, fields, **probes):
    """Trains with and without diagnostics, compares both, and returns the lines of the probes."""
    train_and_evaluate(small_config(**EXAMPLES | fields), folder / "plain")
    train_and_evaluate(config(**fields, **probes), folder / "probed")
    assert unchanged(folder / "plain", folder / "probed")
    return ours(folder / "probed")


def gradients(line):
    """Returns the number of squared gradient norms in a line."""
    return len({key for key in line if key.endswith("gradient_squared")})


@pytest.mark.slow
def test_layerwise(tmp_path):
    lines = trained(tmp_path, {"method__name": "layerwise"})
    assert [line["step"] for line in lines[:4]] == [0, 4, 8, 12]
    assert gradients(lines[0]) == 2
    # From step 6 on, module 0 is frozen and module 1 trains.
    drifts = [line["diagnostics/module_1/mmd"] for line in lines[1:4]]
    assert drifts[0] > 0 < drifts[1]
    assert drifts[2] == 0
    final = [line for line in lines if "final/module_1/mmd" in line]
    # All updates of module 1 read the outputs of the frozen module 0.
    assert final[-1]["final/module_1/weighted_drift"] == 0


@pytest.mark.slow
def test_layerwise_with_codebooks(tmp_path):
    lines = trained(tmp_path, {"method__name": "layerwise", **VQ})
    errors = [line["diagnostics/module_1/codec_error"] for line in lines[:4]]
    # At step 4 module 0 has made 8 updates but sent nothing, so that its codebook is still empty.
    assert all(0 < error < 0.9 for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"method__name": "ddg", "codec__name": "int8", "codec__dims": 4}, {"method__name": "dni"}],
    ids=["ddg,int8", "dni"],
)
def test_methods_with_one_objective(fields, tmp_path):
    # The run stops at 5 and 10 for nothing else than a probe.
    lines = trained(tmp_path, fields, diagnostics__every=5)
    assert [line["step"] for line in lines[:4]] == [0, 5, 10, 12]
    assert gradients(lines[0]) == 1
    if "codec__name" in fields:
        assert 0 < lines[3]["diagnostics/module_1/codec_error"] < 1


@pytest.mark.slow
def test_probes_wait_for_dispatches(tmp_path):
    fields = {"method__name": "backprop", "engine__steps_per_dispatch": 4, "eval__every": 4}
    # Probes are due at 3, 6 and 9.
    lines = trained(tmp_path, fields | {"checkpoint__every": 8}, diagnostics__every=3)
    assert [line["step"] for line in lines[:4]] == [0, 4, 8, 12]
    assert gradients(lines[0]) == 1
