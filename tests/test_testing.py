"""Checks of `dgl_jax.testing`: built-in and `examples/plugin` parts pass, broken parts fail."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from dgl_jax import testing
from dgl_jax.codecs import CodecKind, Stateless
from dgl_jax.config import options
from dgl_jax.config.registry import CODECS, ENGINES, OBJECTIVES
from dgl_jax.core import step
from dgl_jax.engines import EngineKind, fused
from dgl_jax.objectives import Classifier, ObjectiveKind

pytestmark = pytest.mark.usefixtures("plugin_kinds")

CODEC_OPTIONS = {"int8": {"dims": 8}, "vq": {"dims": 8, "codes": 16}}


@pytest.mark.parametrize(
    "name", ["identity", "bf16", "int8", pytest.param("vq", marks=pytest.mark.slow), "signs"]
)
def test_codecs_pass_their_check(name):
    testing.check_codec(name, options("codec", name=name, **CODEC_OPTIONS.get(name, {})))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "reconstruction", "lookahead", "mirror"])
def test_objectives_pass_their_check(name):
    testing.check_objective(objective={"name": name})


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices", "replay"),
    [("fused", 1, {}), ("pipeline", 2, {}), ("simulated", 1, {"size": 2}), ("serial", 1, {})],
)
def test_engines_pass_their_check(name, devices, replay):
    testing.check_engine(name, devices, replay=replay)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dgl", "backprop"])
def test_methods_pass_their_check(name):
    testing.check_method(name)


# Twins


@dataclass(frozen=True)
class Rounded(Stateless):
    lossless: ClassVar[bool] = True

    def encode(self, codebook, activations):
        return activations.astype(jnp.bfloat16)

    def decode(self, codebook, payload):
        return payload.astype(jnp.float32)


def test_twin_lossy_codec_declared_lossless_fails_the_check(monkeypatch):
    monkeypatch.setitem(
        CODECS._kinds, "rounded", CodecKind(lambda options, dtype: Rounded(), lossless=True)
    )
    with pytest.raises(AssertionError, match="declares itself lossless"):
        testing.check_codec("rounded", options("codec", name="rounded"))


class Blind(Classifier):
    """Classifier that ignores its features."""

    def __call__(self, features, context, published, train):
        return super().__call__(0.0 * features, context, published, train)


def test_twin_objective_without_gradient_fails_the_check(monkeypatch):
    monkeypatch.setitem(
        OBJECTIVES._kinds, "blind", ObjectiveKind(lambda options, inputs: Blind(inputs.head))
    )
    with pytest.raises(AssertionError, match="no gradient reaches the body"):
        testing.check_objective(objective={"name": "blind"})


@pytest.mark.medium
def test_twin_step_that_trains_the_module_below_fails_the_check(monkeypatch):
    detach, detached = jax.lax.stop_gradient, []

    def outputs_only(value):
        detached.append(value)  # inputs and outputs, in turns
        return value if len(detached) % 2 else detach(value)

    monkeypatch.setattr(
        step, "lax", SimpleNamespace(**vars(jax.lax) | {"stop_gradient": outputs_only})
    )
    with pytest.raises(AssertionError, match="a gradient reaches the module below"):
        testing.check_objective(objective={"name": "classifier"})


@pytest.mark.slow
def test_twin_engine_that_skips_a_batch_fails_the_check(monkeypatch):
    class Skipping(fused.FusedEngine):
        def run(self, state, source, until, stop=lambda: False):
            shifted = type(
                "Shifted", (), {"batches": staticmethod(lambda start: source.batches(start + 1))}
            )
            yield from super().run(state, shifted, until, stop)

    def make(inputs, options):
        return Skipping(inputs.spec, fused.one_group(inputs.devices[:1], 2))

    monkeypatch.setitem(ENGINES._kinds, "skipping", EngineKind(make, family="synchronous"))
    with pytest.raises(AssertionError, match="results differ"):
        testing.check_engine("skipping")
