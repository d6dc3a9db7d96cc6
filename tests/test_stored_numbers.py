"""Three steps of every engine and codec give the numbers that are stored here, which a change of structure keeps."""

import jax
import numpy as np
import pytest
from runs import small_config

from dgl_jax.config import make_settings
from dgl_jax.run.build import make_experiment

VQ = {"codec__name": "vq", "codec__codes": 16, "codec__dims": 2}
RUNS = {
    "fused": {},
    "bf16": {"codec__name": "bf16"},
    "int8": {"codec__name": "int8", "codec__dims": 2},
    "vq": VQ,
    "vq in two stages": VQ | {"codec__stages": 2},
    "average": {"train__ema": 0.9},
    "micro-batches": {"train__accumulate": 2},
    "pipeline": {"engine__name": "pipeline"},
    "simulated": {"engine__name": "simulated", "replay__size": 3},
    "backprop": {"engine__name": "backprop"},
}
# Larger than the other tests' run: where batch norm sees few values that are all but equal, rounding decides.
WELL_CONDITIONED = {"data__batch_size": 32, "data__train_examples": 96, "model__width": 8, "optimizer__learning_rate": 0.01}
# Of each module a weighted sum of all its parameters.
STORED: dict[str, list[float]] = {
    "fused": [-1.489301, 4.01527],
    "bf16": [-1.489301, 4.03471],
    "int8": [-1.489301, 4.002263],
    "vq": [-1.489301, 4.021527],
    "vq in two stages": [-1.489301, 4.122954],
    "average": [-1.489301, 4.01527],
    "micro-batches": [-1.48935, 4.014859],
    "pipeline": [-1.489301, 4.01527],
    "simulated": [-1.489301, 4.128522],
    "backprop": [0.718994, 3.994202],
}


def sums(modules) -> list[float]:
    """Weighs the parameters of a module by cosines of their places, so that none is like another."""
    found = []
    for module in modules:
        flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(module.params)])
        found.append(float(flat @ np.cos(np.arange(len(flat)))))
    return found


def after_three_steps(**fields) -> list[float]:
    made = make_experiment(make_settings(small_config(**WELL_CONDITIONED | fields)), jax.devices()[:2])
    for last in made.engine.run(made.engine.init(), made.source, 3):
        snapshot = last.snapshot
    return sums(snapshot().modules)


@pytest.mark.parametrize("name", RUNS)
def test_numbers_are_those_stored(name):
    assert after_three_steps(**RUNS[name]) == pytest.approx(STORED[name], rel=1e-4)


def test_other_numbers_are_noticed():
    assert after_three_steps(**RUNS["fused"], optimizer__learning_rate=0.0103) != pytest.approx(STORED["fused"], rel=1e-4)
