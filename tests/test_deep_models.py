"""Tests of VGG and residual networks against published sizes and a NumPy reference."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import he_normal
from numpy_layers import check_forward, max_pool, max_pool_3x3
from test_models import image, trace, walk

from dgl_jax.errors import UserError
from dgl_jax.models import HEADS, NETWORKS, cuts, make_head, make_network, resnet, vgg
from dgl_jax.models.resnet import BasicBlock, Bottleneck, Stem
from dgl_jax.models.vgg import VGGClassifier

IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)
# Blocks, parameters and 10^9 multiplications of a forward pass for 1000 classes at 224 pixels, from
# torchvision's tables.
PUBLISHED = {
    "vgg11": (8, 132_868_840, 7.61),
    "vgg13": (10, 133_053_736, 11.31),
    "vgg16": (13, 138_365_992, 15.47),
    "vgg19": (16, 143_678_248, 19.63),
    "resnet18": (9, 11_689_512, 1.81),
    "resnet34": (17, 21_797_672, 3.66),
    "resnet50": (17, 25_557_032, 4.09),
    "resnet101": (34, 44_549_160, 7.80),
    "resnet152": (51, 60_192_808, 11.51),
}
# Millions of parameters, from He et al. 2016, Table 6.
CIFAR_RESNETS = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
}


def totals(network, shape):
    """Returns the numbers of blocks, parameters and multiplications."""
    rows = walk(network, image(shape))
    parameters = sum(
        leaf.size for _, variables, _ in rows for leaf in jax.tree.leaves(variables["params"])
    )
    return len(network.blocks), parameters, sum(macs for *_, macs in rows)


def check_published(name, network):
    blocks, parameters, macs = totals(network, IMAGENET)
    assert (blocks, parameters, round(macs / 1e9, 2)) == PUBLISHED[name]


@pytest.mark.medium
@pytest.mark.parametrize("name", PUBLISHED)
def test_imagenet_networks_have_published_sizes(name):
    check_published(name, make_network(name, 64, 1000, IMAGENET))


def test_twin_dropped_block_fails():
    network = make_network("vgg13", 64, 1000, IMAGENET)
    with pytest.raises(AssertionError):
        check_published("vgg13", type(network)(network.blocks[:-1], network.classifier))


@pytest.mark.parametrize("name", CIFAR_RESNETS)
def test_cifar_resnets_have_published_sizes(name):
    n = (int(name.removeprefix("resnet")) - 2) // 6

    def stage(c, first):
        """Counts the parameters of 2 n convolutions of 3x3 and their batch norms.

        The first convolution has `first` input channels, the others c.
        """
        return 9 * first * c + (2 * n - 1) * 9 * c * c + 2 * n * 2 * c

    parameters = (
        (9 * 3 * 16 + 2 * 16) + stage(16, 16) + stage(32, 16) + stage(64, 32) + (64 * 10 + 10)
    )
    # Multiplications of a convolution are equal in all stages, except that the first convolution
    # after the channels double has half as many.
    full = 9 * 16 * 16 * 32 * 32
    macs = 9 * 3 * 16 * 32 * 32 + (2 * n + 2 * (2 * n - 0.5)) * full + 640
    assert totals(make_network(name, 16, 10, CIFAR), CIFAR) == (3 * n + 1, parameters, macs)
    assert round(parameters / 1e6, 2 if n < 18 else 1) == CIFAR_RESNETS[name]


def test_resnet18_for_small_images_has_the_size_by_hand():
    # ResNet-18 with 10 classes instead of 1000, and a 3x3 instead of a 7x7 convolution in the stem.
    parameters = 11_689_512 - 990 * 513 - (49 - 9) * 3 * 64
    # Four stages of four convolutions. Where the channels double, the first convolution has half
    # the multiplications, and the projection 1/18.
    full = 9 * 64 * 64 * 32 * 32
    macs = 9 * 3 * 64 * 32 * 32 + (16 - 3 * 0.5 + 3 / 18) * full + 5120
    assert totals(make_network("resnet18_cifar", 64, 10, CIFAR), CIFAR) == (
        9,
        parameters,
        pytest.approx(macs, rel=1e-12),
    )


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "modules", "split", "maps"),
    [  # channels and size of the activations that each module sends, as in the released code
        (
            "vgg13",
            10,
            "count",
            [
                *[(64, 224)] * 2,
                *[(128, 112)] * 2,
                *[(256, 56)] * 2,
                *[(512, 28)] * 2,
                (512, 14),
            ],
        ),
        ("vgg13", 4, "0,3,6,9", [(128, 112), (256, 56), (512, 14)]),
        ("vgg19", 4, "0,4,8,12", [(128, 112), (256, 56), (512, 28)]),
        ("vgg19", 2, "0,8", [(256, 56)]),
        ("resnet152", 2, "0,26", [(1024, 14)]),
        ("resnet110", 2, "0,27", [(32, 16)]),
    ],
)
def test_modules_of_the_papers_have_the_released_activations(name, modules, split, maps):
    width, shape = (16, CIFAR) if name == "resnet110" else (64, IMAGENET)
    network = make_network(name, width, 10, shape)
    starts = cuts(split, len(network.blocks), modules)
    outputs = [y for y, _, _ in walk(network, image(shape))]
    assert [(y.shape[3], y.shape[1]) for y in (outputs[first - 1] for first in starts[1:])] == maps


def test_first_module_of_resnet152_ends_in_the_third_stage():
    """Checks that the first 26 blocks are the stem and 3, 8 and 14 blocks of the stages."""
    blocks = make_network("resnet152", 64, 1000, IMAGENET).blocks[:26]
    assert [block.features for block in blocks] == [64] + [64] * 3 + [128] * 8 + [256] * 14
    assert [number for number, block in enumerate(blocks[1:], 1) if block.stride == 2] == [4, 12]


def test_first_module_of_resnet110_ends_in_the_second_stage():
    """Checks that the first 27 blocks are the stem and 18 and 8 blocks of the stages."""
    blocks = make_network("resnet110", 16, 10, CIFAR).blocks[:27]
    assert [block.features for block in blocks] == [16] + [16] * 18 + [32] * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet18_cifar", "resnet20"])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_head_works_after_every_block(name, size):
    rows = walk(make_network(name, 8, 5, (size, size, 3)), image((size, size, 3)))
    assert rows[-1][0].shape == (1, 5)
    for y, _, _ in rows[:-1]:
        for head in HEADS:
            assert trace(make_head(head, 1000), y)[0].shape == (1, 1000)


def test_only_networks_with_2x2_pooling_need_even_sizes():
    with pytest.raises(
        UserError,
        match=r"images of 48x48 cannot be halved 5 times, as config.model.name='vgg11'.*32 or 64",
    ):
        make_network("vgg11", 8, 10, (48, 48, 3))
    sizes = [
        y.shape[1:3]
        for y, _, _ in walk(make_network("resnet18", 8, 10, (49, 30, 3)), image((49, 30, 3)))[:-1]
    ]
    assert sizes[::2] == [(13, 8), (13, 8), (7, 4), (4, 2), (2, 1)]  # rounded up


# NumPy reference


def relu(x):
    return np.maximum(x, 0)


def numpy_basic(layers, x, stride=1, padded=False):
    y = relu(layers.batch_norm(layers.conv(x, stride)))
    y = layers.batch_norm(layers.conv(y))
    if padded:
        shortcut = np.zeros_like(y)
        shortcut[..., : x.shape[-1]] = x[:, ::stride, ::stride]
    else:
        shortcut = x if y.shape == x.shape else layers.batch_norm(layers.conv(x, stride))
    return relu(y + shortcut)


def numpy_bottleneck(layers, x, stride=1):
    y = relu(layers.batch_norm(layers.conv(x)))
    y = relu(layers.batch_norm(layers.conv(y, stride)))
    y = layers.batch_norm(layers.conv(y))
    return relu(y + (x if y.shape == x.shape else layers.batch_norm(layers.conv(x, stride))))


def numpy_stem(layers, x):
    return max_pool_3x3(relu(layers.batch_norm(layers.conv(x, 2))))


def numpy_classifier(layers, x):
    x = max_pool(x).reshape(len(x), -1)
    return layers.linear(relu(layers.linear(relu(layers.linear(x)))))


def images(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


BLOCKS = [
    (BasicBlock(4), numpy_basic),
    (BasicBlock(6), numpy_basic),
    (BasicBlock(8, stride=2), partial(numpy_basic, stride=2)),
    (BasicBlock(4, padded=True), partial(numpy_basic, padded=True)),
    (BasicBlock(8, stride=2, padded=True), partial(numpy_basic, stride=2, padded=True)),
    (Bottleneck(1), numpy_bottleneck),
    (Bottleneck(3), numpy_bottleneck),
    (Bottleneck(2, stride=2), partial(numpy_bottleneck, stride=2)),
    (Stem(5), numpy_stem),
]


@pytest.mark.medium
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("block", "oracle"), BLOCKS)
def test_block_equals_numpy(block, oracle, train):
    check_forward(block, oracle, images(4, 7, 6, 4), train)


@pytest.mark.parametrize("train", [False, True])
def test_vgg_classifier_equals_numpy(train):
    check_forward(VGGClassifier(7, hidden=9), numpy_classifier, images(5, 6, 4, 3), train)


@pytest.mark.parametrize(
    ("block", "oracle", "name"),
    [
        (BasicBlock(4), numpy_basic, "_projected"),
        (BasicBlock(4, padded=True), partial(numpy_basic, padded=True), "_padded"),
    ],
)
def test_twin_missing_shortcut_fails(block, oracle, name, monkeypatch):
    monkeypatch.setattr(resnet, name, lambda x, *_: jnp.zeros_like(x))
    with pytest.raises(AssertionError):
        check_forward(block, oracle, images(4, 7, 6, 4), False)


def test_twin_other_pooling_fails(monkeypatch):
    monkeypatch.setattr(vgg, "max_pool_2x2", lambda x, ops: x[:, ::2, ::2])
    with pytest.raises(AssertionError):
        test_vgg_classifier_equals_numpy(False)


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "resnet50"])
def test_bfloat16_network_has_float32_state_and_logits(name):
    *rows, (logits, _, _) = walk(make_network(name, 4, 10, CIFAR, "bfloat16"), image())
    assert {y.dtype for y, _, _ in rows} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32
    for _, variables, _ in rows:
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


# Initial values


def check_normal(values, deviation):
    values = np.asarray(values).ravel()
    assert abs(values.mean()) < 5 * deviation / math.sqrt(values.size)
    np.testing.assert_allclose(values.std(), deviation, rtol=4 / math.sqrt(2 * values.size))
    assert np.abs(values).max() > 2.4 * deviation  # not truncated at twice the deviation


def drawn(module, *shape):
    return jax.jit(partial(module.init, train=False))(jax.random.key(0), jnp.zeros(shape))["params"]


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "resnet20", "resnet18_cifar"])
def test_convolutions_are_initialized_kaiming_normal(name):
    block = make_network(name, 32, 10, CIFAR).blocks[3]
    params = drawn(block, 1, 4, 4, 32)
    convs = [p for layer, p in params.items() if layer.startswith("Conv")]
    assert convs
    for p in convs:
        size, _, _, features = p["kernel"].shape
        check_normal(p["kernel"], math.sqrt(2 / (size * size * features)))
        assert not np.any(p.get("bias", 0))
    for p in (p for layer, p in params.items() if layer.startswith("BatchNorm")):
        assert np.all(p["scale"] == 1)
        assert not np.any(p["bias"])


def test_twin_truncated_fan_in_initialization_fails():
    kernel = he_normal()(jax.random.key(0), (3, 3, 64, 32))
    with pytest.raises(AssertionError):
        check_normal(kernel, math.sqrt(2 / (9 * 32)))


def test_linear_layers_of_vgg_are_initialized_normal():
    params = drawn(make_network("vgg11", 2, 10, CIFAR).classifier, 1, 2, 2, 16)
    assert [p["kernel"].shape for p in params.values()] == [(16, 128), (128, 128), (128, 10)]
    for p in params.values():
        check_normal(p["kernel"], 0.01)
        assert not np.any(p["bias"])


def test_every_published_network_is_registered():
    assert set(NETWORKS) >= {
        *PUBLISHED,
        *CIFAR_RESNETS,
        "cnn3",
        "cnn4",
        "cnn6",
        "cnn6_replay",
        "resnet18_cifar",
    }
