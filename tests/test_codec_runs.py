"""Tests of whole runs with a codec: resume, reports, evaluation, export, and refused settings."""

import dataclasses
import json
import shutil
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from runs import records, same_run, small_config
from test_coding import STEPS, VQ
from test_resume import interrupted

from dgl_jax import UserError
from dgl_jax.engines import EngineState
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.plots import plot
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate

FIELDS = {"codec__name": "vq", "codec__codes": 16, "codec__dims": 2, "codec__codebook_every": 5}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "simulated"])
def test_resume_equals_uninterrupted_run(tmp_path, engine, monkeypatch):
    config = partial(small_config, engine__name=engine, replay__size=3, **FIELDS)
    train_and_evaluate(config(), tmp_path / "whole")
    interrupted(tmp_path / "parts", 7, config())
    shutil.copytree(tmp_path / "parts", tmp_path / "broken")
    train_and_evaluate(config(), tmp_path / "parts")
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    # Twin: forget what has been learned since the last publication.
    load = Checkpoints._load

    def forgetful(self, *args):
        loaded = load(self, *args)
        first, *others = loaded.state.modules
        codec_state = first.extras["codec"]
        unlearnt = codec_state["learnt"].replace(entries=jnp.copy(codec_state["published"]))
        first = first.replace(extras={"codec": codec_state | {"learnt": unlearnt}})
        return dataclasses.replace(loaded, state=EngineState((first, *others)))

    monkeypatch.setattr(Checkpoints, "_load", forgetful)
    train_and_evaluate(config(), tmp_path / "broken")
    assert not same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_resumed_pipeline_counts_what_was_sent_before(tmp_path):
    config = small_config(engine__name="pipeline", **FIELDS)
    train_and_evaluate(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "12")
    train_and_evaluate(config, tmp_path / "killed")
    assert same_run(tmp_path / "whole", tmp_path / "killed")
    whole, resumed = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")
    )
    for field in ("wire_bytes_per_image", "codebook_share"):
        assert whole[field] == resumed[field]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("coded") / "run"
    return workdir, train_and_evaluate(small_config(**FIELDS), workdir)


@pytest.mark.slow
def test_run_reports_its_codec(trained):
    workdir, summary = trained
    assert summary.wire == "simulated"
    last = next(r for r in reversed(records(workdir)) if "train/module_0/codec_error" in r)
    assert set(last) >= {
        f"train/module_0/codec_{name}" for name in ("error", "perplexity", "dead", "skipped")
    }
    assert (
        last["wire/module_0/bytes_per_image"]
        == summary.wire_bytes_per_image[0]
        < summary.raw_bytes_per_image[0] / 4
    )
    assert (
        last["wire/module_0/compression"]
        == summary.raw_bytes_per_image[0] / summary.wire_bytes_per_image[0]
    )
    assert last["wire/module_0/codebook_share"] == summary.codebook_share[0]
    assert summary.codec_error == [last["train/module_0/codec_error"]]
    assert 0 < summary.codec_error[0] < 1
    assert (
        json.loads((workdir / "summary.json").read_text())["codebook_share"]
        == summary.codebook_share
    )
    assert workdir / "plots" / "codec.png" in plot(workdir)


@pytest.mark.slow
def test_evaluation_uses_the_published_codebook(trained, tiny, to_host):
    engine = tiny.engine("fused", codec=VQ)
    states, _ = tiny.run(engine, STEPS)
    placed = tiny.place(engine, states)
    batch = next(tiny.source.evaluation("test"))
    coded, _, _ = Evaluator(engine.spec, engine.placement).answers(placed.modules, batch)
    plain, _, _ = Evaluator(engine.spec, engine.placement, codec=False).answers(
        placed.modules, batch
    )
    np.testing.assert_array_equal(coded[0], plain[0])  # the first module reads no message
    assert np.abs(np.asarray(coded[1]) - np.asarray(plain[1])).max() > 1e-4
    # Only the published codebook matters, not what was learned since.
    learnt = [
        s.replace(extras={"codec": s.extras["codec"] | {"learnt": None}}) if s.extras else s
        for s in placed.modules
    ]
    again, _, _ = Evaluator(engine.spec, engine.placement).answers(learnt, batch)
    np.testing.assert_array_equal(again[1], coded[1])


@pytest.mark.slow
def test_export_contains_the_codebooks(trained):
    workdir, _ = trained
    network = load_exported(export_run(workdir))
    assert network.variables[0]["codebook"].shape[2:] == (16, 2)
    assert network.variables[1]["codebook"] == ()
    images = np.random.default_rng(0).integers(
        0, 256, (5, *network.spec.task.example.shape), np.uint8
    )
    with_codec = network.logits(images)[1]
    broken = load_exported(workdir / "export")
    broken.variables[0]["codebook"] = np.zeros_like(broken.variables[0]["codebook"])
    assert not np.allclose(broken.logits(images)[1], with_codec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codec__dims": 3}, r"config\.codec\.dims=3: does not divide \d+ channels"),
        ({"codec__name": "int8", "codec__dims": 5}, r"config\.codec\.dims=5: does not divide"),
        ({"codec__codes": 0}, r"config\.codec\.codes=0: must be between 1 and 65536"),
        ({"codec__codes": 65537}, r"config\.codec\.codes=65537: must be between"),
        ({"codec__decay": 1.5}, r"config\.codec\.decay=1\.5: must be between"),
    ],
)
def test_invalid_sizes_are_one_clear_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(small_config(**(FIELDS | fields)), tmp_path)


@pytest.mark.slow
def test_checkpoint_with_another_codebook_size_is_refused(trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(UserError, match=r"config\.codec\.codes \(was 16, is now 32\)"):
        train_and_evaluate(
            small_config(**(FIELDS | {"codec__codes": 32, "train__steps": 20})), workdir
        )
