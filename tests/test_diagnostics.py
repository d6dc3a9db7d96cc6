"""Diagnostics: distances of samples, and probes of a run, which change none of its numbers."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import arrays, records, small_config
from test_resume import interrupted

from dgl_jax.config import make_settings
from dgl_jax.core import rngs
from dgl_jax.diagnostics import distance, drift, mmd, project, sliced_wasserstein, weighted_drift
from dgl_jax.errors import UserError
from dgl_jax.objectives import Classifier, LocalLoss
from dgl_jax.run.build import make_experiment
from dgl_jax.run.due import Due
from dgl_jax.run.plots import plot
from dgl_jax.tools.report_groups import make_report
from dgl_jax.tools.report_html import page
from dgl_jax.tools.report_runs import read_runs
from dgl_jax.train import train_and_evaluate

OURS = ("diagnostics/", "final/")


def config(**fields):
    """Returns a run of 12 steps with probes at steps 0, 4, 8 and 12."""
    return small_config(diagnostics__enabled=True, diagnostics__every=4, **fields)


def samples(count=50, directions=6):
    random = np.random.default_rng(0)
    one = random.normal(size=(count, directions)).astype(np.float32)
    return one, (one * 1.2 + 0.3 + 0.1 * random.normal(size=one.shape)).astype(np.float32)


def wasserstein_by_hand(x, y):
    gaps = [np.mean((np.sort(x[:, p]) - np.sort(y[:, p])) ** 2) for p in range(x.shape[1])]
    return np.sqrt(np.mean(gaps) / np.mean(y.var(axis=0)))


def mmd_by_hand(x, y):
    def mean(f, a, b):
        return np.mean([f(np.sum((u - v) ** 2)) for u in a for v in b])

    width = mean(lambda squared: squared, y, y)
    parts = [mean(lambda s: np.exp(-s / width), a, b) for a, b in ((x, x), (y, y), (x, y))]
    return np.sqrt(parts[0] + parts[1] - 2 * parts[2])


@pytest.mark.medium
@pytest.mark.parametrize(
    ("measure", "by_hand"), [(sliced_wasserstein, wasserstein_by_hand), (mmd, mmd_by_hand)]
)
def test_distances_and_errors_equal_numpy(measure, by_hand):
    x, y = (sample.astype(np.float64) for sample in samples(35))
    estimate = jax.jit(lambda a, b: distance(measure, a, b))(*samples(35))
    assert float(estimate.value) == pytest.approx(by_hand(x, y), rel=1e-4)
    # 16 groups of two examples: group g has the examples g and g + 16; the last three stay.
    left = [by_hand(*(np.delete(s, [g, g + 16], axis=0) for s in (x, y))) for g in range(16)]
    error = np.sqrt(15 / 16 * np.sum((np.array(left) - np.mean(left)) ** 2))
    assert float(estimate.error) == pytest.approx(error, rel=1e-2)
    swapped = float(measure(*samples(35)[::-1]))
    assert swapped != pytest.approx(float(estimate.value), rel=1e-3)  # the reference sets the scale


def test_equal_samples_have_distance_zero():
    for estimate in drift(samples()[0], samples()[0].copy()).values():
        assert float(estimate.value) == float(estimate.error) == 0
    assert all(float(estimate.value) > 0.1 for estimate in drift(*samples()).values())


def test_distances_of_normal_samples_equal_closed_forms():
    """Compares N(0, 1) and N(m, s^2), at the Wasserstein distance sqrt(m^2 + (1 - s)^2)."""
    random = np.random.default_rng(0)
    reference = random.normal(size=(1000, 1)).astype(np.float32)
    sample = (0.5 + 0.8 * random.normal(size=(1000, 1))).astype(np.float32)
    wasserstein, mmd = map(drift(sample, reference).__getitem__, ("wasserstein", "mmd"))
    expected = np.sqrt(0.5**2 + 0.2**2)
    assert abs(float(wasserstein.value) - expected) < 4 * float(wasserstein.error)

    def kernel(mean, variance):  # mean of exp(-z^2 / 2) for a normal z; the bandwidth is 2
        return np.exp(-(mean**2) / 2 / (1 + variance)) / np.sqrt(1 + variance)

    expected = np.sqrt(kernel(0, 2) + kernel(0, 1.28) - 2 * kernel(0.5, 1.64))
    assert abs(float(mmd.value) - expected) < 4 * float(mmd.error)
    assert 0 < float(mmd.error) < 0.1 * expected


def test_error_shrinks_with_the_number_of_examples():
    few, many = (float(drift(*samples(count))["mmd"].error) for count in (64, 4 * 64))
    assert 0.3 < many / few < 0.8


@pytest.mark.medium
@pytest.mark.parametrize("size", [3, 4096, 5000])
def test_projection_is_a_product_with_fixed_directions(size):
    key = rngs.directions(rngs.root(0), 1)
    x = np.random.default_rng(0).normal(size=(4, size)).astype(np.float32)
    projected = np.asarray(project(x.reshape(4, size, 1), key, 5), np.float64)
    eye = np.eye(size, dtype=np.float32)
    matrix = np.asarray(project(eye, key, 5), np.float64)
    np.testing.assert_allclose(projected, x.astype(np.float64) @ matrix, rtol=0, atol=1e-5)
    # Entries have variance 1 / size, and no two coordinates share them.
    if size > 3:
        assert np.mean(matrix**2) == pytest.approx(1 / size, rel=0.05)
    assert len(np.unique(matrix, axis=0)) == size
    other = project(x, rngs.directions(rngs.root(0), 2), 5)
    assert not np.allclose(other, projected)


def test_weighted_drift_by_hand():
    drifts = weighted_drift([0.25, 0.04, 0.01, 0.0], [2.0, 1.0, 1.0])
    assert drifts == pytest.approx([0.5, (1.0 + 0.2) / 3, (1.0 + 0.2 + 0.1) / 4])
    np.testing.assert_array_equal(weighted_drift([0.25, 0.04, 0.0], [0.0, 1.0]), [np.nan, 0.2])
    # In turn, the updates between two probes read the inputs of the later one.
    drifts = weighted_drift([0.25, 0.04, 0.0, 0.0], [2.0, 1.0, 1.0], in_turn=True)
    assert drifts == pytest.approx([0.2, 0.4 / 3, 0.1])


def test_distances_of_few_or_equal_examples_are_unknown():
    sample = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    few, enough = drift(sample[:2], sample[1:3]), drift(sample, sample[::-1])
    assert np.isfinite(few["mmd"].value)
    assert np.isnan(few["mmd"].error)
    assert np.isfinite(enough["mmd"].error)
    assert np.isnan(sliced_wasserstein(sample, jnp.ones((4, 3))))


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


def others(workdir):
    """Returns the lines of metrics.jsonl without the diagnostics."""
    lines = [
        {key: v for key, v in line.items() if not key.startswith(OURS)} for line in records(workdir)
    ]
    return [line for line in lines if line.keys() - {"step", "epoch"}]


def ours(workdir):
    """Returns the lines of the diagnostics."""
    lines = records(workdir)
    return [line for line in lines if any(key.startswith(OURS) for key in line)]


def unchanged(plain, probed):
    pairs = zip(arrays(plain), arrays(probed), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs) and others(plain) == others(probed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Returns the workdir of a run without diagnostics."""
    workdir = tmp_path_factory.mktemp("plain")
    train_and_evaluate(small_config(), workdir)
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
    titles = ("squared gradient norm", "drift since the last probe (MMD)", "drift sum of the bound")
    text = page(make_report("probed", [run]))
    assert all(f'aria-label="{title}"' in text for title in titles)


@pytest.mark.medium
def test_extended_run_measures_the_new_end(probed, tmp_path):
    folder = shutil.copytree(probed, tmp_path / "run")
    train_and_evaluate(config(train__steps=16), folder)
    final = [line for line in ours(folder) if any(key.startswith("final/") for key in line)]
    assert [line["step"] for line in final] == [0, 4, 8, 12, 16]
    assert final[-1]["final/module_1/mmd"] == 0 < final[-2]["final/module_1/mmd"]


@pytest.mark.medium
def test_run_killed_at_its_end_measures_a_lost_probe_again(probed, tmp_path):
    folder = shutil.copytree(probed, tmp_path / "run")
    (folder / "summary.json").unlink()
    (folder / "diagnostics" / "12.npz").unlink()
    train_and_evaluate(config(), folder)
    assert ours(folder)[-4:] == ours(probed)[-4:]
    assert (folder / "diagnostics" / "12.npz").exists()


RUNS = {
    "pipeline": {"engine__name": "pipeline"},
    "dispatches": {"engine__steps_per_dispatch": 4, "eval__every": 7, "checkpoint__every": 9},
    "simulated,vq": {
        "engine__name": "simulated",
        "engine__slowdown": (1.0, 2.0),
        "replay__size": 3,
        **{"codec__name": "vq", "codec__dims": 2, "codec__codes": 4},
    },
    "backprop": {"method__name": "backprop"},
    "layerwise": {"method__name": "layerwise"},
    "ddg": {"method__name": "ddg"},
    "dni": {"method__name": "dni"},
    "int8,adam,ema": {"codec__name": "int8", "codec__dims": 2, "train__ema": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_probes_change_no_number_of_any_engine_and_method(name, tmp_path):
    train_and_evaluate(small_config(**RUNS[name]), tmp_path / "plain")
    train_and_evaluate(config(**RUNS[name]), tmp_path / "probed")
    assert unchanged(tmp_path / "plain", tmp_path / "probed")
    lines = ours(tmp_path / "probed")
    steps = [0, 7, 9, 12] if name == "dispatches" else [0, 4, 8, 12]
    assert [line["step"] for line in lines[:4]] == steps
    gradients = {key for key in lines[0] if key.endswith("gradient_squared")}
    every = name not in ("backprop", "ddg", "dni")  # the others have one objective
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
    if name in ("simulated,vq", "int8,adam,ema"):
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
