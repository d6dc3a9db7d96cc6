"""Tests of the operation counts, against values by hand and published numbers of networks."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dgl_jax.config import default_config, make_settings
from dgl_jax.ops import conv as convolution
from dgl_jax.ops import pooling
from dgl_jax.profile import flops
from dgl_jax.profile.flops import block_flops
from dgl_jax.run.build import DatasetInfo
from dgl_jax.run.parts import make_blocks

W = jax.ShapeDtypeStruct((8, 8), "float32")
X = jax.ShapeDtypeStruct((4, 8), "float32")
ONE = 2 * 4 * 8 * 8  # operations of x @ w


def conv(x_shape, kernel, out, **options):
    """Counts the operations of a convolution and checks the shape of its outputs."""
    options = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    } | options
    shapes = (jax.ShapeDtypeStruct(shape, "float32") for shape in (x_shape, kernel))
    operations, y = flops.count(lambda x, k: lax.conv_general_dilated(x, k, **options), *shapes)
    assert y.shape == out
    return operations


def test_convolutions_equal_counts_by_hand():
    macs = 2 * 6 * 6 * 9 * 3 * 5
    assert conv((2, 6, 6, 3), (3, 3, 3, 5), (2, 6, 6, 5)) == 2 * macs
    assert conv((2, 6, 6, 3), (3, 3, 3, 5), (2, 3, 3, 5), window_strides=(2, 2)) == 2 * macs / 4
    assert conv((2, 6, 6, 3), (3, 3, 3, 5), (2, 4, 4, 5), padding="VALID") == 2 * macs * 16 / 36
    assert (
        conv((2, 6, 6, 3), (3, 3, 3, 5), (2, 2, 2, 5), padding="VALID", rhs_dilation=(2, 2))
        == 2 * macs * 4 / 36
    )
    # With 2 groups, each of 4 output channels reads half of the 4 input channels; depthwise, one.
    assert (
        conv((2, 6, 6, 4), (3, 3, 2, 4), (2, 6, 6, 4), feature_group_count=2)
        == 2 * 2 * 36 * 9 * 2 * 4
    )
    assert (
        conv((2, 6, 6, 4), (3, 3, 1, 4), (2, 6, 6, 4), feature_group_count=4) == 2 * 2 * 36 * 9 * 4
    )
    # Transposed: each of 3x3 inputs is multiplied with each of 2x2 taps.
    transposed = {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}
    assert conv((2, 3, 3, 3), (2, 2, 3, 5), (2, 6, 6, 5), **transposed) == 2 * 2 * 9 * 4 * 3 * 5
    channels_first = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}
    assert conv((2, 3, 6, 6), (5, 3, 3, 3), (2, 5, 6, 6), **channels_first) == 2 * macs


def test_matrix_products_equal_counts_by_hand():
    def count(function, *shapes):
        return flops.count(function, *(jax.ShapeDtypeStruct(s, "float32") for s in shapes))[0]

    assert count(jnp.matmul, (4, 8), (8, 3)) == 2 * 4 * 8 * 3
    assert count(jnp.matmul, (7, 4, 8), (7, 8, 3)) == 2 * 7 * 4 * 8 * 3  # a batch of products
    assert (
        count(lambda a, b: jnp.einsum("abc,bcd->ad", a, b), (4, 5, 6), (5, 6, 7))
        == 2 * 4 * 5 * 6 * 7
    )
    assert count(lambda a, b: jnp.tanh(a) * b + a.sum(), (4, 8), (4, 8)) == 0


@jax.custom_vjp
def with_custom_vjp(x, w):
    return x @ w


with_custom_vjp.defvjp(lambda x, w: (with_custom_vjp(x, w), w), lambda w, g: (g @ w @ w, g.T @ g))


@jax.custom_jvp
def with_custom_jvp(x, w):
    return x @ w


with_custom_jvp.defjvp(
    lambda primals, tangents: (with_custom_jvp(*primals), tangents[0] @ primals[1] @ primals[1])
)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (lambda x, w: jax.jit(lambda x: jax.jit(jnp.matmul)(x, w) @ w)(x), 2),
        (with_custom_vjp, 1),
        (with_custom_jvp, 1),
        (lambda x, w: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), 1),
        (lambda x, w: lax.scan(lambda x, _: (x @ w @ w, None), x, None, length=5)[0], 10),
        (lambda x, w: lax.fori_loop(0, 3, lambda _, x: x @ w, x), 3),
        # The number of iterations depends on the data: the body counts once.
        (lambda x, w: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x), 1),
        # The most expensive branch counts.
        (lambda x, w: lax.cond(x.sum() > 0, lambda x: x, lambda x: x @ w @ w, x), 2),
        (lambda x, w: lax.switch(x.argmax(), [lambda x: x @ w, lambda x: x @ w @ w @ w], x), 3),
        (
            lambda x, w: lax.platform_dependent(
                x, cpu=lambda x: x @ w @ w, default=lambda x: x @ w
            ),
            1,
        ),
        # Without a default branch, the most expensive one counts.
        (lambda x, w: lax.platform_dependent(x, cpu=lambda x: x @ w @ w, cuda=lambda x: x), 2),
        (lambda x, w: jax.vmap(lambda x: x @ w)(x), 1),
    ],
)
def test_operations_inside_jax_constructs_are_counted(function, times):
    operations, y = flops.count(function, X, W)
    assert operations == times * ONE
    assert y.shape == X.shape


def test_custom_gradients_are_counted_if_they_are_used():
    def loss(x, w):
        return with_custom_vjp(x, w).sum()

    # x @ w; then g @ w @ w and g.T @ g.
    assert flops.count(jax.grad(loss, argnums=(0, 1)), X, W)[0] == ONE + 2 * ONE + ONE


def test_cpu_formulations_do_not_change_the_count(monkeypatch, fresh_traces):
    """Counts direct convolutions; the twin counts the products of Winograd, which are fewer."""
    x, kernel = (
        jax.ShapeDtypeStruct((8, 16, 16, 64), "float32"),
        jax.ShapeDtypeStruct((3, 3, 64, 64), "float32"),
    )
    axes = ("NHWC", "HWIO", "NHWC")

    def operations():
        def convolve(x, k):
            return convolution.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=axes)

        return flops.count(convolve, x, kernel)[0]

    expected = 2 * 8 * 16 * 16 * 9 * 64 * 64
    assert operations() == expected
    assert flops.count(pooling.max_pool_3x3, x)[0] == 0
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: cpu(*args))
    assert 0 < operations() < expected / 2


# 10^9 multiply-adds of networks for 1000 classes at 224 pixels, from torchvision's tables.
PUBLISHED = {
    "vgg11": 7.61,
    "vgg16": 15.47,
    "vgg19": 19.63,
    "resnet18": 1.81,
    "resnet34": 3.66,
    "resnet50": 4.09,
    "resnet152": 11.51,
}


def vgg_macs(stages):
    """Counts 3x3 convolutions in five stages, each at half the size, and three linear layers."""
    macs, channels = 25088 * 4096 + 4096 * 4096 + 4096 * 1000, 3
    for stage, (count, width) in enumerate(zip(stages, (64, 128, 256, 512, 512))):
        for _ in range(count):
            macs += (224 // 2**stage) ** 2 * 9 * channels * width
            channels = width
    return macs


def resnet_macs(stages, bottleneck):
    """Counts a 7x7 convolution to 112x112, blocks at 56, 28, 14 and 7, and a linear layer.

    The stride of a stage is in the 3x3 convolution of its first block.
    """
    macs, channels = 112**2 * 49 * 3 * 64, 64
    for stage, count in enumerate(stages):
        inner, side = 64 * 2**stage, 56 // 2**stage
        out = 4 * inner if bottleneck else inner
        for n in range(count):
            before = 2 * side if stage and not n else side
            if bottleneck:
                macs += before**2 * channels * inner + side**2 * (9 * inner * inner + inner * out)
            else:
                macs += side**2 * 9 * (channels * inner + inner * inner)
            macs += side**2 * channels * out if channels != out else 0
            channels = out
    return macs + channels * 1000


BY_HAND = {
    "vgg11": vgg_macs((1, 1, 2, 2, 2)),
    "vgg16": vgg_macs((2, 2, 3, 3, 3)),
    "vgg19": vgg_macs((2, 2, 4, 4, 4)),
    "resnet18": resnet_macs((2, 2, 2, 2), False),
    "resnet34": resnet_macs((3, 4, 6, 3), False),
    "resnet50": resnet_macs((3, 4, 6, 3), True),
    "resnet152": resnet_macs((3, 8, 36, 3), True),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_published_multiply_adds(name):
    config = default_config()
    config.data.name, config.data.batch_size, config.model.name, config.model.modules = (
        "imagenet",
        2,
        name,
        1,
    )
    info = DatasetInfo(
        "imagenet", tuple(map(str, range(1000))), (224, 224, 3), (0.5,) * 3, (0.5,) * 3
    )
    parts = block_flops(make_blocks(make_settings(config), info))
    macs = (sum(parts.inner) + parts.heads[0][-1]) / (2 * 2)
    assert macs == BY_HAND[name]
    assert round(macs / 1e9, 2) == PUBLISHED[name]
