"""Tests of modes, engines and codecs on a backend that behaves like an accelerator plug-in.

It answers no optional queries and refuses functions written for CPUs; see `accelerator.behave`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from accelerator import ANSWERS, behave
from PIL import Image
from runs import FIELDS, small_config

from dgl_jax import models, system
from dgl_jax.codecs import CODECS, vq
from dgl_jax.config import make_settings
from dgl_jax.config.registry import NETWORKS
from dgl_jax.evaluate import evaluate_run
from dgl_jax.models.blocks import ConvBlock
from dgl_jax.profile import flops
from dgl_jax.run import plots
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.tools.bench import bench
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.plan import plan_run
from dgl_jax.tools.predict import predict_run
from dgl_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
SHORT = {"model__name": "two", "train__steps": 2, "checkpoint__every": 2, "log__every": 1}
RUNS = {
    "fused": {"codec__name": "identity", "train__accumulate": 2, "model__remat": True},
    # As on an accelerator by default: the data stay there, and one dispatch runs several steps.
    "loops": {
        "engine__name": "fused",
        "engine__steps_per_dispatch": 2,
        "data__on_device": "on",
        "train__steps": 4,
        "checkpoint__every": 4,
        "eval__every": 4,
    },
    "pipeline": {
        "codec__name": "vq",
        "codec__dims": 4,
        "codec__codes": 16,
        "codec__codebook_every": 1,
    },
    "simulated": {"codec__name": "int8", "codec__dims": 4, "replay__size": 2},
    "threads": {"codec__name": "bf16", "replay__size": 2},
    "backprop": {},
    "fdg": {"engine__name": "pipeline", "method__name": "fdg"},
    "cdni": {"engine__name": "fused", "method__name": "cdni"},
    "layerwise": {"engine__name": "fused", "method__name": "layerwise"},
}
TIMED_ALONE = (
    "fused",
    "loops",
    "pipeline",
    "simulated",
    "threads",
    "cdni",
)  # every turn is an update


def config(engine, **fields):
    groups = {"engine__group_sizes": (2, 2)} if engine == "pipeline" else {}
    return small_config(**{"engine__name": engine} | SHORT | groups | RUNS[engine] | fields)


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch, fresh_traces):
    """Registers a network of two blocks, one of them with pooling, that compiles quickly."""
    monkeypatch.setattr(NETWORKS, "_kinds", dict(NETWORKS._kinds))
    models.register_network(
        "two",
        lambda width, _, dtype: [
            ConvBlock(width, dtype=dtype),
            ConvBlock(2 * width, pool=True, dtype=dtype),
        ],
    )


@pytest.fixture(params=ANSWERS)
def plugin(request, monkeypatch):
    behave(monkeypatch, request.param)
    return request.param


@pytest.mark.medium
def test_runs_cover_every_codec():
    assert {fields.get("codec__name", "identity") for fields in RUNS.values()} == set(CODECS)


@pytest.mark.pictures
@pytest.mark.slow
@pytest.mark.parametrize("engine", RUNS)
def test_engines_train_evaluate_predict_export_plot_and_bench(plugin, engine, tmp_path, caplog):
    with caplog.at_level("INFO", logger="dgl_jax"):
        summary = train_and_evaluate(config(engine), tmp_path)
    assert summary.steps == (4 if engine == "loops" else 2)
    assert caplog.text.count("cpu: module 0 on ") == 1  # the platform replaces the device's kind
    metrics = evaluate_run(tmp_path)
    assert metrics["test/module_1/accuracy"] == summary.modules[1]["test_accuracy"]
    Image.fromarray(np.full((20, 20, 3), 80, np.uint8)).save(tmp_path / "a.png")
    predict_run(tmp_path, "newest", [str(tmp_path / "a.png")], tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text().count("\n") == 2
    exported = load_exported(export_run(tmp_path))
    assert len(exported.spec.modules) == 2
    assert {path.name for path in plots.plot(tmp_path)} >= {"accuracy.png", "loss.png"}
    result = json.loads(json.dumps(bench(config(engine), 1)))
    assert result["peak_memory_bytes"] == {"process": "unknown"}
    assert result["images_per_second"] > 0
    assert len(result["module_milliseconds"]) == (2 if engine in TIMED_ALONE else 0)


@pytest.mark.medium
def test_plan_measures_times_without_memory_statistics(plugin):
    settings = make_settings(config("fused", model__split="time", train__accumulate=1))
    plan = json.loads(plan_run(settings, as_json=True))
    assert plan["peak_memory_bytes"] == [None, None]
    assert plan["cores"] is None
    assert plan["block_times"] == "measured on cpu"
    assert "peak memory, MiB\n0" in plan_run(settings, stated="1,2").replace("  ", "")


def test_flops_equal_those_counted_on_a_cpu(monkeypatch):
    settings = make_settings(config("fused"))
    network = make_blocks(settings, known_info(settings.data))
    before = flops.block_flops(network)
    assert min(before.inner) > 0
    for answer in ANSWERS:
        with monkeypatch.context() as patch:
            behave(patch, answer)
            flops.forward_flops.cache_clear()
            flops.call_flops.cache_clear()
            assert flops.block_flops(network) == before
    flops.forward_flops.cache_clear()
    flops.call_flops.cache_clear()


def command_line(answer, *flags):
    """Runs the command line in a process of its own and returns it."""
    process = subprocess.run(
        [sys.executable, "tests/accelerator.py", answer, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ,
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.medium
@pytest.mark.parametrize("answer", ANSWERS)
def test_command_line_prints_a_plan(answer):
    process = command_line(
        answer,
        "--config=configs/digits.py",
        *(f"--config.{name}={value}" for name, value in FIELDS.items()),
        "--mode=plan",
        "--block_times=1,2,3,4",
    )
    assert "peak memory, MiB" in process.stdout


SWEEP = f"""
from dgl_jax.config import default_config

def get_sweep():
    for engine in ("fused", "pipeline"):
        config = default_config()
        config.update_from_flattened_dict({FIELDS | {"train.steps": 2}})
        config.engine.name = engine
        yield engine, config
"""


@pytest.mark.slow
@pytest.mark.parametrize("answer", ANSWERS)
def test_sweep_trains_its_rows_and_reports_them(answer, tmp_path):
    file = tmp_path / "two.py"
    file.write_text(SWEEP)
    process = command_line(answer, "--mode=sweep", f"--sweep={file}", f"--workdir={tmp_path}")
    assert "2 of 2 runs finished" in process.stderr
    for name in ("fused", "pipeline"):  # children ask for it as well, and get no answer
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["peak_memory_bytes"] is None
    command_line(answer, "--mode=report", f"--workdir={tmp_path}")
    assert "pipeline" in (tmp_path / "report.html").read_text()


# Twins


@pytest.mark.parametrize("answer", ANSWERS)
def test_twin_plan_without_guarded_queries_fails(answer, monkeypatch):
    behave(monkeypatch, answer)
    settings = make_settings(config("fused", model__split="count", train__accumulate=1))
    plan_run(settings, stated="1,2")
    monkeypatch.setattr(system, "_answer", lambda ask, read=lambda answer: answer: read(ask()))
    with pytest.raises((NotImplementedError, AttributeError, TypeError)):
        plan_run(settings, stated="1,2")


def test_twin_tracing_a_function_for_cpus_fails(monkeypatch):
    behave(monkeypatch, "none", default=False)
    x, entries = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 3, 4), (1, 3, 4)))
    with pytest.raises(AssertionError, match="_running_minimum is for CPUs"):
        flops.count(lambda e, x: vq.encode(e, x), entries, x)
