"""Tests of convolutional blocks and of the layers that blocks and heads share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy_layers import check_forward, max_pool

from dgl_jax.models import blocks
from dgl_jax.models.blocks import ConvBlock


def numpy_block(pool):
    def oracle(layers, x):
        return np.maximum(layers.batch_norm(layers.conv(max_pool(x) if pool else x)), 0)

    return oracle


BLOCKS = [
    (ConvBlock(5), False),
    (ConvBlock(5, pool=True, bias=False), True),
    (ConvBlock(4, pool=True, kernel=5), True),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("block", "pool"), BLOCKS)
def test_block_equals_numpy(block, pool, train):
    x = np.random.default_rng(1).normal(size=(6, 8, 6, 3))
    check_forward(block, numpy_block(pool), x, train)


def flax_batch_norm(**changed):
    def make(dtype, ops):
        def batch_norm(x, train, *, relu, offset):
            x = x if offset is None else x + offset
            options = {"use_running_average": not train, "momentum": 0.9, "epsilon": 1e-5}
            return nn.relu(nn.BatchNorm(**options | changed)(x))

        return batch_norm

    return make


@pytest.mark.parametrize(
    "changed", [{"momentum": 0.99}, {"epsilon": 1e-3}, {"use_running_average": True}], ids=str
)
def test_twin_other_batch_norm_fails(changed, monkeypatch, fresh_traces):
    monkeypatch.setattr(blocks, "BatchNorm", flax_batch_norm())
    test_block_equals_numpy(ConvBlock(5), False, True)
    monkeypatch.setattr(blocks, "BatchNorm", flax_batch_norm(**changed))
    with pytest.raises(AssertionError):
        test_block_equals_numpy(ConvBlock(5), False, True)


def check_uniform(values, fan_in):
    """Checks that values are uniform in +-1/sqrt(fan_in), by range, mean and variance."""
    bound = 1 / math.sqrt(fan_in)
    assert np.abs(values).max() <= np.float32(bound)
    assert min(values.max(), -values.min()) > 0.98 * bound
    assert abs(values.mean()) < 0.05 * bound
    np.testing.assert_allclose(values.var(), bound**2 / 3, rtol=0.1)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = blocks.Conv(2048, kernel=1)(x)
        x = blocks.Conv(512)(x[..., :16])
        return blocks.linear(x[:, 0, 0, :9], 2048, dtype="float32")


def test_default_initial_values_equal_pytorch():
    x = jnp.zeros((1, 1, 1, 7))
    params = jax.jit(Layers().init)(jax.random.key(0), x)["params"]
    check_uniform(np.asarray(params["Conv_0"]["kernel"]), 7)
    check_uniform(np.asarray(params["Conv_0"]["bias"]), 7)
    check_uniform(np.asarray(params["Conv_1"]["kernel"]), 3 * 3 * 16)
    check_uniform(np.asarray(params["Dense_0"]["kernel"]), 9)
    check_uniform(np.asarray(params["Dense_0"]["bias"]), 9)
    with pytest.raises(AssertionError):  # twin: the default of flax
        check_uniform(
            np.asarray(nn.initializers.lecun_normal()(jax.random.key(0), (1, 1, 7, 2048))), 7
        )


def test_convolution_adds_its_bias_only_if_asked():
    x, conv = jnp.ones((2, 4, 4, 3)), blocks.Conv(5)
    variables = conv.init(jax.random.key(0), x)
    without, bias = conv.apply(variables, x, add_bias=False), variables["params"]["bias"]
    assert np.all(bias != 0)
    np.testing.assert_array_equal(conv.apply(variables, x), without + bias)
    assert "bias" not in blocks.Conv(5, bias=False).init(jax.random.key(0), x)["params"]
