"""Diagnostics: distances of samples, and probes of a run, which change none of its numbers."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from probed_runs import EXAMPLES, config, ours, unchanged
from runs import records, small_config
from test_resume import interrupted

from dgl_jax.config import make_settings
from dgl_jax.diagnostics import weighted_drift
from dgl_jax.errors import UserError
from dgl_jax.objectives import Classifier, LocalLoss
from dgl_jax.run.due import Due
from dgl_jax.run.plots import plot
from dgl_jax.tools.report_groups import make_report
from dgl_jax.tools.report_html import page
from dgl_jax.tools.report_runs import read_runs
from dgl_jax.train import train_and_evaluate


def test_probes_are_due():
    every = {"log_every": 1, "evaluate_every": 6, "save_every": 4, "total_steps": 13}
    apart = Due(**every, probe_every=5)
    assert [step for step in range(1, 14) if apart.at(step).probe] == [5, 10, 13]
    assert [apart.next_event(step) for step in (3, 4, 8)] == [4, 5, 10]
    # Stops are at 4, 6, 8, 12 and 13; the probes of 5 and 10 wait for them.
    later = Due(**every, probe_every=5, probe_apart=False)
    assert [step for step in range(1, 14) if later.at(step).probe] == [6, 12, 13]
    assert [later.next_event(step) for step in range(13)] == [
        Due(**every).next_event(step) for step in range(13)
    ]
    assert not any(Due(**every).at(step).probe for step in range(1, 14))


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"enabled": True, "every": 0}, (), r"config.diagnostics.every=0: must be between 1 and "),
        (
            {"every": 9},
            ("diagnostics.every",),
            r"config.diagnostics.every=9: applies to config.diagnostics.enabled=True, not to False",
        ),
    ],
)
def test_bad_settings_are_one_line(fields, given, message):
    with pytest.raises(UserError, match=message):
        make_settings({"diagnostics": fields}, given)


def test_probe_set_larger_than_the_data_is_one_line(tmp_path):
    message = (
        r"config.diagnostics.batches=7: 56 examples, but the training data have [0-9] batches of 8"
    )
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config(diagnostics__batches=7), tmp_path)


@pytest.mark.medium
def test_objective_without_gradient_is_one_line(tmp_path, monkeypatch):
    original = Classifier.__call__

    def constant(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return LocalLoss(jax.lax.stop_gradient(loss.loss), *loss[1:])

    monkeypatch.setattr(Classifier, "__call__", constant)
    message = "config.diagnostics.enabled=True: the objective of module_0 has no gradient"
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config(train__label_smoothing=0.125), tmp_path)  # not in the cache


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Returns the workdir of a run without diagnostics."""
    workdir = tmp_path_factory.mktemp("plain")
    train_and_evaluate(small_config(**EXAMPLES), workdir)
    return workdir


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    """Returns the workdir of the same run with diagnostics."""
    workdir = tmp_path_factory.mktemp("probed")
    train_and_evaluate(config(), workdir)
    return workdir


@pytest.mark.medium
def test_probes_change_no_number(plain, probed):
    assert ours(plain) == []
    assert not (plain / "diagnostics").exists()
    assert unchanged(plain, probed)


@pytest.mark.medium
def test_metrics_of_the_probes(probed):
    lines = ours(probed)
    assert [line["step"] for line in lines] == [0, 4, 8, 12] * 2
    first, *later = lines[:4]
    keys = {"gradient_squared", "gradient_second_moment", "gradient_unbiased"}
    distances = {f"{name}{end}" for name in ("wasserstein", "mmd") for end in ("", "_error")}
    for line in lines[:4]:
        metrics = {key.removeprefix("diagnostics/module_1/") for key in line if "module_1" in key}
        assert metrics == (keys if line is first else keys | distances)
        assert {key.rsplit("/")[-1] for key in line if "module_0" in key} == keys
        for k in (0, 1):
            squared, second, unbiased = (
                line[f"diagnostics/module_{k}/gradient_{key}"]
                for key in ("squared", "second_moment", "unbiased")
            )
            assert 0 < squared < second
            assert unbiased == pytest.approx(2 * squared - second, rel=1e-6)  # two batches
    assert all(0 < line["diagnostics/module_1/mmd"] < 1 for line in later)
    final = lines[4:]
    assert final[-1]["final/module_1/mmd"] == final[-1]["final/module_1/wasserstein"] == 0
    # Between the last two probes, the drift is the same from both points of view.
    assert final[2]["final/module_1/mmd"] == pytest.approx(
        later[-1]["diagnostics/module_1/mmd"], rel=0.2
    )
    drifts = [line["final/module_1/mmd"] for line in final]
    sums = [line.get("final/module_1/weighted_drift") for line in final]
    assert sums[0] is None  # a constant learning rate weights all updates equally
    assert sums[1:] == pytest.approx([np.mean(np.sqrt(drifts[:n])) for n in (1, 2, 3)])
    # Checkpoints 8 and 12 are left.
    kept = {line["step"]: line for line in final if "final/module_1/gradient_squared" in line}
    assert set(kept) == {8, 12}
    for k in (0, 1):
        name = f"module_{k}/gradient_squared"
        assert kept[12][f"final/{name}"] == pytest.approx(later[-1][f"diagnostics/{name}"])
    # The inputs of module 0 do not change, the inputs of module 1 do.
    at_8 = [kept[8][f"final/module_{k}/gradient_squared"] for k in (0, 1)]
    before = [later[1][f"diagnostics/module_{k}/gradient_squared"] for k in (0, 1)]
    assert at_8[0] == pytest.approx(before[0], rel=1e-5)
    assert at_8[1] != pytest.approx(before[1], rel=1e-3)


@pytest.mark.medium
def test_stopped_run_resumes_exactly(probed, tmp_path):
    interrupted(tmp_path / "run", 6, config())
    kept = shutil.copytree(tmp_path / "run", tmp_path / "twin")
    train_and_evaluate(config(), tmp_path / "run")
    assert records(tmp_path / "run") == records(probed)
    for path in (probed / "diagnostics").iterdir():
        with np.load(path) as one, np.load(tmp_path / "run" / "diagnostics" / path.name) as other:
            assert all(np.array_equal(one[name], other[name]) for name in one.files)
    # Twin: what the last probe has left is lost.
    (kept / "diagnostics" / "4.npz").write_bytes(b"damaged")
    train_and_evaluate(config(), kept)
    lines = {line["step"]: line for line in ours(kept)[:4]}
    assert "diagnostics/module_1/mmd" not in lines[8]
    assert "diagnostics/module_1/mmd" in lines[12]
    assert unchanged(probed, kept)


@pytest.mark.medium
@pytest.mark.pictures
def test_pictures_of_the_probes(probed):
    assert probed / "plots" / "convergence.png" in plot(probed)


@pytest.mark.medium
def test_report_has_the_curves_of_the_probes(probed):
    ((run,), _) = read_runs(probed)
    assert run.curves["diagnostics", 1, "mmd"][0] == pytest.approx([4 / 6, 8 / 6, 2])
    assert len(run.curves["diagnostics", 0, "gradient_squared"][0]) == 4
    assert ("final", 1, "weighted_drift") in run.curves
    titles = (
        "squared gradient norm",
        "squared gradient norm, final inputs",
        "drift since the last probe (MMD)",
        "drift since the last probe (Wasserstein)",
        "drift sum of the bound",
    )
    text = page(make_report("probed", [run]))
    assert all(f'aria-label="{title}"' in text for title in titles)


@pytest.mark.medium
def test_extended_run_measures_the_new_end(tmp_path):
    for steps in (12, 16):
        train_and_evaluate(config(schedule__name="cosine", train__steps=steps), tmp_path)
    final = [line for line in ours(tmp_path) if any(key.startswith("final/") for key in line)]
    assert [line["step"] for line in final] == [0, 4, 8, 12, 16]
    assert final[-1]["final/module_1/mmd"] == 0 < final[-2]["final/module_1/mmd"]

    # The drift is weighted with the learning rates that were used, also in the shorter run.
    def rates(used):
        return [
            0.025 * sum(1 + np.cos(np.pi * i / used[i // 12]) for i in range(n, n + 4))
            for n in (0, 4, 8, 12)
        ]

    distances = [line["final/module_1/mmd"] for line in final]
    sums = [line["final/module_1/weighted_drift"] for line in final[1:]]
    assert sums == pytest.approx(weighted_drift(distances, rates((12, 16))), rel=2e-3)
    assert sums != pytest.approx(weighted_drift(distances, rates((16, 16))), rel=1e-2)


@pytest.mark.medium
def test_run_killed_at_its_end_measures_a_lost_probe_again(probed, tmp_path):
    folder = shutil.copytree(probed, tmp_path / "run")
    (folder / "summary.json").unlink()
    (folder / "diagnostics" / "12.npz").unlink()
    train_and_evaluate(config(), folder)
    assert ours(folder) == ours(probed)
    assert (folder / "diagnostics" / "12.npz").exists()


@pytest.mark.medium
def test_damaged_checkpoint_leaves_out_its_gradients(probed, tmp_path, caplog):
    folder = shutil.copytree(probed, tmp_path / "run")
    (folder / "summary.json").unlink()
    for file in (folder / "checkpoints" / "8").rglob("d/*"):
        file.write_bytes(b"")
    train_and_evaluate(config(), folder)
    assert "the gradients of step 8 are left out" in caplog.text
    final = [line for line in ours(folder) if "final/module_1/gradient_squared" in line]
    assert [line["step"] for line in final] == [12]
    assert (folder / "summary.json").exists()


@pytest.mark.medium
def test_run_without_a_checkpoint_yet_is_probed_once(probed, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(probed / "config.json", folder)
    first, *_ = (probed / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "diagnostics/module_1/gradient_squared" in json.loads(first)
    (folder / "metrics.jsonl").write_text(first)
    train_and_evaluate(config(), folder)
    assert ours(folder) == ours(probed)
