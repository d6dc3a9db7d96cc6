"""Tests of the CIFAR networks: shapes, parameters, multiplications and error messages."""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced import equations

from dgl_jax.errors import UserError
from dgl_jax.models import make_head, make_network
from dgl_jax.ops.cpu import im2col, winograd

CIFAR = (32, 32, 3)


def trace(module, x):
    """Returns the shapes of a module's output and variables, without computing anything."""
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, True), x)


def macs(module, variables, x):
    """Counts the multiplications of matrix products and direct convolutions in a module."""
    with (
        mock.patch.object(winograd, "fits", return_value=False),
        mock.patch.object(im2col, "fits", return_value=False),
    ):
        program = jax.make_jaxpr(lambda v, x: module.apply(v, x, False))(variables, x)
    total = 0
    for e in equations(program.jaxpr):
        out = math.prod(e.outvars[0].aval.shape)
        if e.primitive.name == "conv_general_dilated":
            total += out * math.prod(e.invars[1].aval.shape[:-1])
        elif e.primitive.name == "dot_general":
            ((contracted, _), _) = e.params["dimension_numbers"]
            total += out * math.prod(e.invars[0].aval.shape[i] for i in contracted)
    return total


def walk(network, x):
    """Returns (output, variables, multiplications) of each block and of the classifier."""
    rows = []
    for module in (*network.blocks, network.classifier):
        y, variables = trace(module, x)
        rows.append((y, variables, macs(module, variables, x)))
        x = y
    return rows


def image(shape=CIFAR, dtype="float32"):
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def test_networks_with_equal_arguments_are_equal_and_hashable():
    a, b, c = (make_network("cnn6", width, 10, CIFAR) for width in (8, 8, 16))
    assert a == b
    assert hash(a) == hash(b)
    assert a != c


# By network: width w, maps as (channels, size), and numbers of weights and biases of all
# convolutions, computed by hand:
# cnn6         27 w + 18 w^2 + 36 w^2 + 72 w^2 + 2 * 144 w^2 weights, 17 w biases
# cnn6_replay  27 w + 9 (1 + 2 + 4 + 8 + 16) w^2 weights, no biases
# cnn4         27 w + 18 w^2 + 36 w^2 + 72 w^2 weights, 9 w biases
# cnn3         75 w + 2 * 25 w^2 weights, 3 w biases
SHAPES = {
    "cnn6": (
        128,
        [(128, 32), (256, 16), (256, 16), (512, 8), (512, 8), (512, 8)],
        6_786_432,
        2_176,
    ),
    "cnn6_replay": (
        128,
        [(128, 32), (128, 32), (256, 16), (256, 16), (512, 8), (512, 8)],
        4_574_592,
        0,
    ),
    "cnn4": (64, [(64, 32), (128, 16), (128, 16), (256, 8)], 517_824, 576),
    "cnn3": (128, [(128, 10), (128, 3), (128, 1)], 828_800, 384),
}


def check_shapes(network, name):
    _, maps, weights, biases = SHAPES[name]
    *rows, _ = walk(network, image())
    assert [(y.shape[3], y.shape[1]) for y, _, _ in rows] == maps
    convs = [variables["params"]["Conv_0"] for _, variables, _ in rows]
    assert sum(c["kernel"].size for c in convs) == weights
    assert sum(c["bias"].size for c in convs if "bias" in c) == biases


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_parameters_equal_values_by_hand(name):
    check_shapes(make_network(name, SHAPES[name][0], 10, CIFAR), name)


def test_twin_other_variant_fails():
    with pytest.raises(AssertionError):
        check_shapes(make_network("cnn6_replay", 128, 10, CIFAR), "cnn6")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cnn6", [3.5, 75.5, 151, 75.5, 151, 151]), ("cnn6_replay", [3.5, 151, 75.5, 151, 75.5, 151])],
)
def test_multiplications_of_blocks_equal_published_values(name, expected):
    rows = walk(make_network(name, 128, 10, CIFAR), image())
    # 3.54 was published as 3.5.
    np.testing.assert_allclose([m / 1e6 for _, _, m in rows[:-1]], expected, rtol=0.012)
    np.testing.assert_allclose(sum(m for _, _, m in rows[:-1]) / 1e6, 607, rtol=0.01)


@pytest.mark.parametrize(
    ("head", "ratios"),  # percent of the largest block, for 128, 256 and 512 channels
    [("mlp", [0.52, 2.09, 8.35]), ("mlp_sr", [2.61, 4.17, 10.43]), ("cnn", [200, 200, 200])],
)
def test_multiplications_of_a_head_equal_published_ratios(head, ratios):
    module = make_head(head, 10)
    for (channels, size), ratio in zip([(128, 32), (256, 16), (512, 8)], ratios):
        x = image((size, size, channels))
        _, variables = trace(module, x)
        np.testing.assert_allclose(
            100 * macs(module, variables, x) / (256 * 256 * 9 * 256), ratio, rtol=0.01
        )


@pytest.mark.parametrize(
    ("name", "head", "percent"),
    [
        ("cnn6", "mlp", 5.3), ("cnn6", "mlp_sr", 7.9), ("cnn6", "cnn", 249),
        ("cnn6_replay", "mlp", 3.4), ("cnn6_replay", "mlp_sr", 6.0), ("cnn6_replay", "cnn", 249),
    ],
)  # fmt: skip
def test_multiplications_of_all_heads_equal_published_percentages(name, head, percent):
    rows = walk(make_network(name, 128, 10, CIFAR), image())[:-1]
    module = make_head(head, 10)
    extra = sum(macs(module, trace(module, y)[1], y) for y, _, _ in rows[:-1])
    np.testing.assert_allclose(100 * extra / sum(m for _, _, m in rows), percent, rtol=0.01)


def test_synthetic_gradient_network_refuses_images_that_shrink_to_nothing():
    walk(make_network("cnn3", 4, 10, (27, 27, 3)), image((27, 27, 3)))
    with pytest.raises(UserError, match=r"config.data.image_size.*2x2 map.*at least 27x27"):
        walk(make_network("cnn3", 4, 10, (26, 26, 3)), image((26, 26, 3)))


def test_convolutional_head_of_5x5_kernels_starts_without_a_signal():
    maps = image((3, 3, 8))
    logits, _ = trace(make_head("conv5x5", 10), maps)
    assert logits.shape == (1, 10)
    params = make_head("conv5x5", 10).init(jax.random.key(0), jnp.ones(maps.shape), train=False)
    kernels = [p["kernel"] for name, p in params["params"].items() if name.startswith("Conv")]
    assert [kernel.shape for kernel in kernels] == [(5, 5, 8, 8)] * 3
    assert [bool(kernel.any()) for kernel in kernels] == [True, True, False]


@pytest.mark.parametrize(("name", "hidden"), [("cnn4", 2), ("cnn6", 2), ("cnn6_replay", 3)])
def test_classifier_has_the_hidden_layers_of_the_paper(name, hidden):
    logits, variables, _ = walk(make_network(name, 8, 7, (8, 8, 1)), image((8, 8, 1)))[-1]
    assert logits.shape == (1, 7)
    linear = [
        p["kernel"].shape for layer, p in variables["params"].items() if layer.startswith("Dense")
    ]
    assert linear == [(128, 128)] * hidden + [(128, 7)]  # a map of 2x2x32


@pytest.mark.parametrize(
    ("size", "works"), [(30, "28 or 32"), (1, "such as 4"), (9, "8 or 12"), (0, "multiples of 4")]
)
def test_images_that_cannot_be_halved_are_refused(size, works):
    with pytest.raises(UserError, match=f"config.data.image_size: images of {size}x8 .*{works}"):
        make_network("cnn4", 8, 10, (size, 8, 1))
    assert make_network("cnn4", 8, 10, (28, 8, 1)).halvings == 2


def test_bfloat16_network_has_float32_state_and_logits():
    network = make_network("cnn4", 4, 10, (8, 8, 3), "bfloat16")
    *rows, (logits, classifier, _) = walk(network, image((8, 8, 3)))
    assert {y.dtype for y, _, _ in rows} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32
    for variables in [classifier, *(v for _, v, _ in rows)]:
        assert set(variables) == {"params", "batch_stats"}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    # The running averages remain float32 after an update.
    block, (_, variables, _) = network.blocks[1], rows[1]
    y, updated = jax.eval_shape(
        lambda v, x: block.apply(v, x, True, mutable=["batch_stats"]),
        variables,
        image((8, 8, 4), "bfloat16"),
    )
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
