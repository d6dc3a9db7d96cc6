"""Every engine learns the embedded digits: the shipped configuration, narrowed and shortened, three seeds."""

import statistics
from pathlib import Path

import pytest

from dgl_jax.configs import digits
from dgl_jax.train import train_and_evaluate


def accuracy(engine: str, seed: int, workdir: Path, **train: float) -> float:
    """Test accuracy of the last module."""
    config = digits.get_config()
    config.seed = seed
    config.engine.name = engine
    config.engine.group_sizes = (1, 1, 1, 1) if engine == "pipeline" else ()
    config.model.width = 16
    config.train.update(train or {"epochs": 16.0})
    config.eval.every = config.checkpoint.every = 10_000  # at the end
    return train_and_evaluate(config, workdir).modules[-1]["test_accuracy"]


@pytest.mark.parametrize("engine", ["fused", "pipeline", "backprop"])
def test_digits_to_97_percent(engine, tmp_path):
    accuracies = [accuracy(engine, seed, tmp_path / str(seed)) for seed in range(3)]
    assert statistics.mean(accuracies) >= 0.97, accuracies


def test_twin_an_untrained_network_does_not_know_them(tmp_path):
    assert accuracy("fused", 0, tmp_path, steps=1) < 0.5
