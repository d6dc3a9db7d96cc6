"""Accuracy on the digits: the shipped configuration, shortened, under several engines."""

import statistics
from functools import cache

import jax
import pytest

from dgl_jax.configs import digits
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Returns a function that trains with an engine, a seed and a length, and caches its results.

    The function returns the test accuracy of every module.
    """

    @cache
    def run(engine: str, seed: int = 0, **train: float) -> list[float]:
        config = digits.get_config()
        config.seed = seed
        if engine == "backprop":
            config.method.name = engine
        else:
            config.engine.name = engine
        config.train.update(train or {"epochs": 8.0})
        config.eval.every = config.checkpoint.every = 10_000  # only at the end
        devices = jax.devices()
        visible = devices if engine == "pipeline" else devices[:1]
        with pytest.MonkeyPatch.context() as patched:
            # One device per module under every engine, because only then all bits are equal.
            patched.setattr(jax, "devices", lambda *_: visible)
            modules = train_and_evaluate(config, tmp_path_factory.mktemp(engine)).modules
        assert [module["devices"] for module in modules] == (
            [[0], [1], [2], [3]] if engine == "pipeline" else [[0]] * 4
        )
        return [module["test_accuracy"] for module in modules]

    return run


@pytest.mark.full_compile
@pytest.mark.parametrize("engine", ["fused", "backprop"])
def test_last_module_reaches_97_percent(accuracies, engine):
    last = [accuracies(engine, seed)[-1] for seed in range(3)]
    assert statistics.mean(last) >= 0.97, last


@pytest.mark.full_compile
def test_pipeline_reaches_the_accuracies_of_fused(accuracies):
    assert accuracies("pipeline") == accuracies("fused")


# `dni` and `cdni` with two modules, as in their publication.
@pytest.mark.parametrize(
    ("method", "modules", "least"),
    [
        ("layerwise", 4, 0.93),
        ("deep_supervision", 4, 0.93),
        ("ddg", 4, 0.93),
        ("features_replay", 4, 0.93),
        ("fdg", 4, 0.93),
        # Here full compilation is worth its time.
        pytest.param("dni", 2, 0.9, marks=pytest.mark.full_compile),
        pytest.param("cdni", 2, 0.9, marks=pytest.mark.full_compile),
    ],
)
def test_every_other_method_learns_digits(method, modules, least, tmp_path):
    config = digits.get_config()
    config.method.name, config.model.modules = method, modules
    config.model.width, config.train.epochs = 8, 6.0
    trained = train_and_evaluate(config, tmp_path).modules
    assert trained[-1]["test_accuracy"] > least
    if method == "layerwise":
        assert all(module["test_accuracy"] > 0.85 for module in trained)


@pytest.mark.full_compile
def test_twin_a_network_after_one_step_is_below_50_percent(accuracies):
    assert accuracies("fused", steps=1)[-1] < 0.5
