"""Tests of numbers under JAX settings of the environment: x64, NaN checks, random generators."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import small_config, spec_of

from dgl_jax.config import make_settings
from dgl_jax.config.registry import METHODS
from dgl_jax.core import rngs
from dgl_jax.core.optimizer import make_schedule
from dgl_jax.engines import EngineState
from dgl_jax.run.build import DatasetInfo
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.types import Batch

SCRIPT = Path(__file__).parent / "every_engine.py"
DETERMINISTIC = ("fused", "pipeline", "simulated", "backprop", "resumed")


def run(directory: Path, **environment: str) -> dict[str, dict]:
    command = [sys.executable, str(SCRIPT), str(directory)]
    # With NaN checks JAX compiles other programs. Their results have the same bits only with XLA's
    # default fusion, so `--xla_cpu_use_fusion_emitters=false` of the fast compilation is left out.
    flags = {
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1",
    }
    env = os.environ | flags | environment
    process = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Returns the summaries of a run without extra settings, and its folder of checkpoints."""
    directory = tmp_path_factory.mktemp("plain") / "checkpoints"
    return run(directory), directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {},
        # To save time, x64 and NaN checks each share a run with another random generator.
        {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg"},
        {"JAX_DEBUG_NANS": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"},
    ],
    ids=["plain", "x64, unsafe_rbg", "nans, rbg"],
)
def test_engines_and_codecs_do_not_depend_on_the_environment(plain, environment, tmp_path):
    """Checks dtypes, finiteness and resuming from another environment's checkpoint.

    Without x64 the bits of all deterministic runs must be the same too.
    """
    expected, checkpoint = plain
    shutil.copytree(checkpoint, tmp_path / "checkpoints")
    summaries = run(tmp_path / "checkpoints", **environment) if environment else expected
    for name, summary in summaries.items():
        if name != "resumed":
            checked = (name, summary["changed"], summary["wide"], summary["finite"])
            assert checked == (name, [], [], True)
    if "JAX_ENABLE_X64" not in environment:
        assert summaries["resumed"] == {"digest": summaries["fused"]["digest"]}
        assert {name: summaries[name]["digest"] for name in DETERMINISTIC} == {
            name: expected[name]["digest"] for name in DETERMINISTIC
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn4", "cnn6_replay", "vgg11", "resnet20", "resnet50"])
def test_no_array_of_a_step_exceeds_32_bits(name):
    """Checks parameters, statistics, optimizer state, average, codebooks and metrics under x64.

    The shapes are traced abstractly, so that nothing is compiled.
    """
    info = DatasetInfo("two", ("a", "b"), (32, 32, 3), (0.0,) * 3, (1.0,) * 3)
    integers = jax.ShapeDtypeStruct((8,), np.int32)
    batch = Batch(
        jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8),
        {"label": integers, "id": integers},
        jax.ShapeDtypeStruct((), np.int32),
    )
    fields = {
        "codec__name": "vq",
        "codec__dims": 1,
        "codec__codes": 4,
        "train__ema": 0.5,
        "train__accumulate": 2,
    }
    with jax.enable_x64(True):
        for dtype, more in (
            ("float32", {"schedule__name": "cosine", "schedule__warmup_epochs": 1.0}),
            ("bfloat16", {"optimizer__name": "adam"}),
        ):
            settings = make_settings(
                small_config(model__name=name, model__dtype=dtype, **fields, **more)
            )
            spec = spec_of(settings, info, make_schedule(settings.schedule, 0.1, 5, 20))
            states = spec.abstract_states()
            new, metrics = jax.eval_shape(
                spec.method.fused(spec, [(k, "step") for k in range(len(states))]), states, batch
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path((states, new, metrics)):
                if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                    assert leaf.dtype.itemsize <= 4, jax.tree_util.keystr(path)
            jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), states, new)
        assert jax.eval_shape(lambda: jax.numpy.zeros(())).dtype == np.float64, (
            "x64 was not enabled"
        )


@pytest.mark.medium
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dgl", "backprop")])
def test_no_array_of_a_method_exceeds_32_bits(name):
    """Checks the turns of the fullest tick under x64, without compiling anything."""
    info = DatasetInfo("two", ("a", "b"), (8, 8, 3), (0.0,) * 3, (1.0,) * 3)
    fields = {"method__name": name, "model__modules": 3, "train__ema": 0.5}
    if name != "deep_supervision":
        fields |= {"codec__name": "vq", "codec__dims": 1, "codec__codes": 4}
    with jax.enable_x64(True):
        spec = spec_of(make_settings(small_config(**fields)), info)
        fullest = max(spec.method.schedule([0] * 3, 6, 6), key=len)
        step = spec.method.fused(spec, [(turn.module, turn.kind) for turn in fullest])
        states = spec.abstract_states()
        new, metrics = jax.eval_shape(step, states, spec.batch())
        for path, leaf in jax.tree_util.tree_leaves_with_path((states, new, metrics)):
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                assert leaf.dtype.itemsize <= 4, jax.tree_util.keystr(path)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), states, new)


def test_checkpoint_restores_random_keys_of_another_kind(tmp_path, tiny):
    engine = tiny.engine("fused", modules=1)
    key = rngs.module(jax.random.key(3, impl="rbg"), 0)
    state = EngineState(
        tuple(m.replace(rng=key) for m in tiny.place(engine, tiny.init(engine.spec)).modules)
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {})
    shapes = jax.eval_shape(lambda: state.modules)
    restored = checkpoints.restore(lambda meta: (shapes, engine.placement)).state.modules[0].rng
    checkpoints.close()
    assert restored.dtype == key.dtype
    np.testing.assert_array_equal(jax.random.key_data(restored), jax.random.key_data(key))
