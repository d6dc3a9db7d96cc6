"""Every engine learns the embedded digits: the shipped configuration, shortened, on one device a module."""

import statistics
from functools import cache

import jax
import pytest

from dgl_jax.configs import digits
from dgl_jax.train import train_and_evaluate

pytestmark = [pytest.mark.slow, pytest.mark.full_compile]


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Returns a function of engine, seed and training length that gives the test accuracy of every module."""

    @cache
    def run(engine: str, seed: int = 0, **train: float) -> list[float]:
        config = digits.get_config()
        config.seed = seed
        if engine == "backprop":
            config.method.name = engine
        else:
            config.engine.name = engine
        config.train.update(train or {"epochs": 8.0})
        config.eval.every = config.checkpoint.every = 10_000  # at the end
        every = jax.devices()
        with pytest.MonkeyPatch.context() as patched:
            # Each module computes on one device under every engine, which makes equal bits.
            patched.setattr(jax, "devices", lambda *_: every if engine == "pipeline" else every[:1])
            modules = train_and_evaluate(config, tmp_path_factory.mktemp(engine)).modules
        assert [module["devices"] for module in modules] == (
            [[0], [1], [2], [3]] if engine == "pipeline" else [[0]] * 4
        )
        return [module["test_accuracy"] for module in modules]

    return run


@pytest.mark.parametrize("engine", ["fused", "backprop"])
def test_digits_to_97_percent(accuracies, engine):
    of_last = [accuracies(engine, seed)[-1] for seed in range(3)]
    assert statistics.mean(of_last) >= 0.97, of_last


def test_a_pipeline_learns_the_same(accuracies):
    assert accuracies("pipeline") == accuracies("fused")


def test_twin_an_untrained_network_does_not_know_them(accuracies):
    assert accuracies("fused", steps=1)[-1] < 0.5
