"""Tests of the heads against a NumPy reference, for maps and tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import adaptive_avg_pool, check_forward
from traced import equations

from dgl_jax.config import ModelSettings
from dgl_jax.errors import UserError
from dgl_jax.models import HEADS, blocks, heads, make_head
from dgl_jax.models.heads import MLPHead
from dgl_jax.ops import BatchNorm

REDUCED = {56: 14, 28: 7, 14: 4, 12: 3, 8: 2, 7: 2, 4: 2, 2: 2, 1: 1}


def numpy_mlp(layers, x, convs=0, hidden=3):
    size = x.shape[1]
    x = adaptive_avg_pool(x, (REDUCED[size],) * 2)
    for _ in range(convs):
        x = np.maximum(layers.batch_norm(layers.conv(x)), 0)
    x = adaptive_avg_pool(x, (min(2, size),) * 2).reshape(len(x), -1)
    for _ in range(hidden):
        x = np.maximum(layers.batch_norm(layers.linear(x)), 0)
    return layers.linear(x)


def numpy_cnn(layers, x):
    for _ in range(2):
        x = np.maximum(layers.batch_norm(layers.conv(x)), 0)
    return layers.linear(
        layers.batch_norm(adaptive_avg_pool(x, (min(2, x.shape[1]),) * 2)).reshape(len(x), -1)
    )


def numpy_conv5x5(layers, x):
    for _ in range(2):
        x = np.maximum(layers.batch_norm(layers.conv(x)), 0)
    return layers.linear(layers.conv(x).mean((1, 2)))


def numpy_linear(layers, x):
    return layers.linear(x.mean((1, 2)))


ORACLES = {
    "mlp_sr": partial(numpy_mlp, convs=3),
    "mlp": numpy_mlp,
    "cnn": numpy_cnn,
    "conv5x5": numpy_conv5x5,
    "linear": numpy_linear,
}


def images(size, batch=6, channels=3):
    return np.random.default_rng(size).normal(size=(batch, size, size, channels)).astype(np.float32)


def test_head_names_equal_the_choices_of_the_configuration():
    (field,) = (f for f in dataclasses.fields(ModelSettings) if f.name == "head")
    assert field.metadata["kinds"] is HEADS
    assert list(HEADS) == list(ORACLES)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_head_equals_numpy(name, train):
    check_forward(make_head(name, 10), ORACLES[name], images(12), train)


@pytest.mark.parametrize("size", [8, 7, 4, 2, 1])
def test_mlp_sr_head_equals_numpy_for_small_maps(size):
    check_forward(make_head("mlp_sr", 10), ORACLES["mlp_sr"], images(size), False)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [56, 28, 14])  # maps of ImageNet networks
def test_head_equals_numpy_for_large_maps_and_a_thousand_classes(name, size):
    check_forward(make_head(name, 1000), ORACLES[name], images(size, batch=2), False)


def test_classifier_of_networks_equals_numpy():
    check_forward(MLPHead(10, hidden=2), partial(numpy_mlp, hidden=2), images(8), True)


# Tokens


def numpy_token_mlp(layers, x, convs=0):
    for _ in range(convs):
        x = np.maximum(layers.batch_norm(layers.conv(x[:, :, None]))[:, :, 0], 0)
    x = x.mean(1)
    for _ in range(3):
        x = np.maximum(layers.batch_norm(layers.linear(x)), 0)
    return layers.linear(x)


TOKEN_ORACLES = {
    "mlp_sr": partial(numpy_token_mlp, convs=3),
    "mlp": numpy_token_mlp,
    "linear": lambda layers, x: layers.linear(x.mean(1)),
}


def tokens(count=7):
    return np.random.default_rng(count).normal(size=(6, count, 3)).astype(np.float32)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TOKEN_ORACLES)
def test_head_equals_numpy_for_tokens(name, train):
    check_forward(make_head(name, 10), TOKEN_ORACLES[name], tokens(), train)


@pytest.mark.parametrize("name", TOKEN_ORACLES)
def test_twin_first_token_instead_of_average_fails(name, monkeypatch, fresh_traces):
    monkeypatch.setattr(heads, "adaptive_avg_pool", lambda x, out, ops: x[:, :1, :1])
    with pytest.raises(AssertionError):
        check_forward(make_head(name, 10), TOKEN_ORACLES[name], tokens(), False)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "cnn",
            (2, 5, 3),
            r"config.model.head='cnn': needs maps .*not features of shape \(B, 5, 3\); for tokens",
        ),
        (
            "linear",
            (2, 3),
            r"config.model.head: needs maps .* or tokens .*, not features of shape \(B, 3\)",
        ),
        ("mlp", (2, 1, 2, 2, 3), r"not features of shape \(B, 1, 2, 2, 3\)"),
    ],
)
def test_features_that_a_head_cannot_read_are_refused(name, shape, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(
            lambda x: make_head(name, 10).init(jax.random.key(0), x, True), jnp.zeros(shape)
        )


@pytest.mark.parametrize("name", HEADS)
def test_twin_wrong_average_fails(name, monkeypatch, fresh_traces):
    def corner(x, out, ops):
        return x[:, : out[0], : out[1]]

    monkeypatch.setattr(heads, "adaptive_avg_pool", corner)
    with pytest.raises(AssertionError):
        check_forward(make_head(name, 10), ORACLES[name], images(12), False)


@pytest.mark.parametrize("name", ["mlp_sr", "mlp", "cnn"])
def test_twin_wrong_statistics_fail(name, monkeypatch, fresh_traces):
    original = BatchNorm
    for file in (heads, blocks):
        monkeypatch.setattr(
            file,
            "BatchNorm",
            lambda *fields: lambda x, train, **options: original(*fields)(x, not train, **options),
        )
    with pytest.raises(AssertionError):
        check_forward(make_head(name, 10), ORACLES[name], images(12), False)


@pytest.mark.parametrize("name", HEADS)
def test_head_accepts_rectangular_maps(name):
    head = make_head(name, 10)
    logits, _ = jax.eval_shape(
        lambda x: head.init_with_output(jax.random.key(0), x, True), jnp.zeros((2, 6, 9, 3))
    )
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16_head_has_float32_state_and_logits(name):
    head = make_head(name, 10, "bfloat16")
    x = jnp.zeros((2, 8, 8, 3), jnp.bfloat16)
    logits, variables = jax.eval_shape(
        lambda x: head.init_with_output(jax.random.key(0), x, True), x
    )
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert inner_dtypes(head, variables, x) == (
        {"bfloat16", "float32"} if name != "linear" else {"float32"}
    )
    assert inner_dtypes(make_head(name, 10), variables, x) == {"float32"}


def inner_dtypes(head, variables, x):
    """Returns the dtypes of the results of all convolutions and matrix products.

    Only the last result, the logits, must be float32.
    """
    jaxpr = jax.make_jaxpr(lambda v, x: head.apply(v, x, False))(variables, x)
    products = ("conv_general_dilated", "dot_general")
    return {
        str(e.outvars[0].aval.dtype) for e in equations(jaxpr.jaxpr) if e.primitive.name in products
    }
