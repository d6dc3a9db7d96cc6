"""Diagnostics under engines with codecs: they change no number of a run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probed_runs import ASYNCHRONOUS, EXAMPLES, VQ, config, ours, unchanged
from runs import records, small_config
from test_resume import interrupted

from dgl_jax.config import make_settings
from dgl_jax.core import rngs
from dgl_jax.run.build import make_experiment
from dgl_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory) -> Path:
    """Returns the workdir of an asynchronous run with diagnostics."""
    workdir = tmp_path_factory.mktemp("asynchronous")
    train_and_evaluate(config(**ASYNCHRONOUS), workdir)
    return workdir


@pytest.mark.slow
def test_probes_change_no_number_of_an_asynchronous_run(asynchronous, tmp_path):
    train_and_evaluate(small_config(**EXAMPLES | ASYNCHRONOUS), tmp_path)
    assert unchanged(tmp_path, asynchronous)
    lines = ours(asynchronous)
    assert [line["step"] for line in lines[:4]] == [0, 4, 8, 12]
    assert lines[3]["diagnostics/module_1/staleness"] >= 0
    assert 0 < lines[3]["diagnostics/module_1/codec_error"] < 1
    assert all(f"diagnostics/module_{k}/gradient_squared" in lines[0] for k in (0, 1))


@pytest.mark.slow
def test_stopped_asynchronous_run_resumes_exactly(asynchronous, tmp_path):
    interrupted(tmp_path, 6, config(**ASYNCHRONOUS))
    train_and_evaluate(config(**ASYNCHRONOUS), tmp_path)
    assert records(asynchronous) == records(tmp_path)
    assert ours(asynchronous)[3]["diagnostics/module_1/staleness"] >= 0


@pytest.mark.slow
def test_probe_before_training_starts_the_codebook(asynchronous):
    """Compares the error of the first probe with a codebook started on its first batch."""
    experiment = make_experiment(make_settings(config(**ASYNCHRONOUS)))
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
    measured = ours(asynchronous)[0]["diagnostics/module_1/codec_error"]
    assert measured == pytest.approx(np.mean(errors), rel=1e-4)
    assert 0.05 < np.mean(errors) < 0.8  # with an empty codebook it would be 1


@pytest.mark.slow
def test_threads_run_with_probes(tmp_path):
    train_and_evaluate(config(engine__name="threads", replay__size=2), tmp_path)
    lines = ours(tmp_path)
    assert lines[0]["step"] == 0
    assert any("diagnostics/module_1/mmd" in line for line in lines)
    final = [line for line in lines if "final/module_1/mmd" in line]
    assert final[-1]["final/module_1/mmd"] == 0


@pytest.mark.slow
def test_probes_change_no_number_of_a_pipeline(tmp_path):
    settings = {
        **{"engine__name": "pipeline", "codec__codebook_every": 6, **VQ},
        **{"optimizer__name": "adam", "train__ema": 0.5},
    }
    train_and_evaluate(small_config(**EXAMPLES | settings), tmp_path / "plain")
    # The run stops at 5 and 10 for nothing else than a probe.
    train_and_evaluate(config(diagnostics__every=5, **settings), tmp_path / "probed")
    assert unchanged(tmp_path / "plain", tmp_path / "probed")
    lines = ours(tmp_path / "probed")
    assert [line["step"] for line in lines[:4]] == [0, 5, 10, 12]
    assert 0 < lines[3]["diagnostics/module_1/codec_error"] < 1
    assert all(f"diagnostics/module_{k}/gradient_squared" in lines[0] for k in (0, 1))
