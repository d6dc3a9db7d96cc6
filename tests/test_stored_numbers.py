"""Tests that three steps of engines, codecs and methods give the numbers in `stored_numbers.json`.

The network has no batch norm, maxima or kinks, and no value of the data lies near a tie between two
codes or levels, so nothing magnifies rounding errors. After an intended change of numbers, run
`python tests/test_stored_numbers.py` to rewrite the file.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from runs import small_config  # noqa: E402

from dgl_jax.config import make_settings  # noqa: E402
from dgl_jax.config.registry import NETWORKS  # noqa: E402
from dgl_jax.core import ema  # noqa: E402
from dgl_jax.models import NetworkKind  # noqa: E402
from dgl_jax.run.build import make_experiment  # noqa: E402

STORED = Path(__file__).with_name("stored_numbers.json")
SHARED: dict[str, Any] = {
    "model__name": "smooth",
    "data__validation_fraction": 0.1,  # of the run whose numbers are stored
    "train__steps": 3,
    "train__label_smoothing": 0.1,
    "optimizer__momentum": 0.9,
    "optimizer__weight_decay": 0.01,
}
RUNS: dict[str, dict[str, Any]] = {
    "fused": {},
    "pipeline": {"engine__name": "pipeline"},
    "simulated": {"engine__name": "simulated", "replay__size": 3},
    "backprop": {"engine__name": "backprop"},
    "average and micro-batches": {"train__ema": 0.9, "train__accumulate": 2},
    "bf16": {"codec__name": "bf16"},
    "int8": {"codec__name": "int8", "codec__dims": 2},
    "vq": {"codec__name": "vq", "codec__codes": 16, "codec__dims": 2, "codec__stages": 2},
}


class Smooth(nn.Module):
    """Block of a 3x3 convolution and GELU."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.gelu(nn.Conv(self.features, (3, 3), self.stride)(x))


def smooth(width: int, num_classes: int, dtype: Any) -> list[nn.Module]:
    return [Smooth(width * scale, stride) for scale, stride in ((1, 2), (2, 1), (2, 2))]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    NETWORKS._kinds["smooth"] = NetworkKind(smooth)
    yield
    del NETWORKS._kinds["smooth"]


def moved(before: Any, after: Any) -> dict[str, list[float]]:
    """Returns two numbers per array that describe its change.

    They are the norm of the change, and the sum of the change weighted by cosines of the index.
    """

    def one(a: Any, b: Any) -> list[float]:
        change = (np.asarray(b, np.float64) - np.asarray(a, np.float64)).ravel()
        return [float(np.linalg.norm(change)), float(change @ np.cos(np.arange(len(change))))]

    pairs = jax.tree.map(one, before, after)
    leaves = jax.tree_util.tree_leaves_with_path(pairs, is_leaf=lambda x: isinstance(x, list))
    return {jax.tree_util.keystr(path): numbers for path, numbers in leaves}


def after_three_steps(**fields: Any) -> dict[str, list[float]]:
    """Returns each module's losses, and how its parameters and their average moved."""
    experiment = make_experiment(make_settings(small_config(**SHARED | fields)), jax.devices()[:2])
    start = experiment.engine.init()
    before = [jax.tree.map(np.array, module.params) for module in start.modules]
    losses: list[list[float]] = [[] for _ in before]
    for report in experiment.engine.run(start, experiment.source, 3):
        snapshot = report.snapshot
        for module_losses, metrics in zip(losses, report.metrics):
            module_losses += [float(metrics["loss"][0] / metrics["loss"][1])] if metrics else []
    numbers_by_name = {f"losses {k}": values for k, values in enumerate(losses) if values}
    for k, (params, module) in enumerate(zip(before, snapshot().modules)):
        numbers_by_name |= {
            f"module {k}{path}": values for path, values in moved(params, module.params).items()
        }
        if "ema" in module.extras:
            numbers_by_name |= {
                f"average {k}{path}": values
                for path, values in moved(params, ema.evaluated(module)[0]).items()
            }
    return numbers_by_name


def differing(numbers: dict[str, list[float]], stored: dict[str, list[float]]) -> list[str]:
    """Returns the names of rows that differ by more than 1e-4 of their largest number."""

    def same(name: str) -> bool:
        return np.allclose(
            numbers[name], stored[name], rtol=0, atol=1e-4 * np.max(np.abs(stored[name]))
        )

    return [
        name
        for name in numbers.keys() | stored.keys()
        if name not in numbers or name not in stored or not same(name)
    ]


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


@pytest.mark.parametrize(
    "name",
    ["fused", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name != "fused")],
)
def test_numbers_equal_the_stored_ones(name, stored):
    assert differing(after_three_steps(**RUNS[name]), stored[name]) == []


@pytest.mark.full_compile
@pytest.mark.slow
def test_numbers_equal_with_full_compilation(stored):
    assert differing(after_three_steps(), stored["fused"]) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer__learning_rate": 0.05005},
        pytest.param({"optimizer__momentum": 0.901}, marks=pytest.mark.slow),
        pytest.param({"train__label_smoothing": 0.101}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_twin_other_settings_are_detected(fields, stored):
    numbers = after_three_steps(**fields)
    assert numbers.keys() == stored["fused"].keys()
    assert differing(numbers, stored["fused"])


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    NETWORKS._kinds["smooth"] = NetworkKind(smooth)
    runs = []
    for run, fields in RUNS.items():
        rows = [
            f"  {json.dumps(k)}: {[float(f'{x:.7g}') for x in numbers]}"
            for k, numbers in after_three_steps(**fields).items()
        ]
        runs.append(f" {json.dumps(run)}: {{\n" + ",\n".join(rows) + "\n }")
    STORED.write_text("{\n" + ",\n".join(runs) + "\n}\n")
