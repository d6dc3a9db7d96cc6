"""Tests of the terms of local losses against values computed by hand."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.errors import UserError
from dgl_jax.models import make_network
from dgl_jax.models.resnet import BasicBlock
from dgl_jax.objectives import (
    OBJECTIVES,
    Classifier,
    InfoPro,
    ObjectiveInputs,
    Transport,
    auglocal,
    cross_entropy,
    info_pro,
    pred_sim,
)
from dgl_jax.objectives.transport import residuals

# Three examples of two classes.
LABEL = np.array([0, 1, 1], np.int32)


class Given(nn.Module):
    """Head without parameters: the logits are the average of the map."""

    @nn.compact
    def __call__(self, x, train):
        return x.reshape(len(x), -1, x.shape[-1]).mean(axis=1)


def options(name, **fields):
    return OBJECTIVES[name].options(name=name, **fields)


def inputs(end, k=0, modules=2, network="cnn6", width=4, dtype="float32", **fields):
    blocks = make_network(network, width, 10, (32, 32, 3), dtype).blocks
    head = nn.Dense(10)
    return ObjectiveInputs(k, modules, blocks, end, 10, head, make_head=lambda n: Given(), **fields)


def make(name, at, **fields):
    return OBJECTIVES[name].make(options(name, **fields), at)


# Similarity matching


def test_similarity_loss_by_hand():
    # After centering, the vectors are (1, -1), (-1, 1) and (1, -1) up to positive factors: the
    # first and third agree, and their labels do not; the second and third are opposite, and their
    # labels agree. Four of nine pairs are off by 2.
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    np.testing.assert_allclose(pred_sim.similarity_loss(x, LABEL, 2), 16 / 9, rtol=1e-6)
    agreeing = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    np.testing.assert_allclose(pred_sim.similarity_loss(agreeing, LABEL, 2), 0.0, atol=1e-12)
    # Across three classes the similarity of labels is -1/2: two pairs are off by 1/2.
    two = pred_sim.similarity_loss(x[:2], np.array([0, 1]), 3)
    np.testing.assert_allclose(two, 2 * 0.25 / 4, rtol=1e-6)
    one = pred_sim.similarity_loss(x[:2], np.array([0, 0]), 1)  # of a single class, all agree
    np.testing.assert_allclose(one, 2 * 4 / 4, rtol=1e-6)


def test_deviation_is_unbiased_and_differentiable_at_zero():
    x = jnp.array([[[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]])  # variances (4 + 0 + 4) / 2 and 0
    np.testing.assert_allclose(pred_sim.deviation(x), [[2.0, 0.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: pred_sim.deviation(x).sum())(x)
    np.testing.assert_allclose(gradient[0, :, 1], 0.0)
    np.testing.assert_allclose(gradient[0, :, 0], [-0.5, 0.0, 0.5], rtol=1e-6)


def test_pred_sim_weighs_both_terms():
    # Maps of 1 x 2 pixels, whose deviations per channel are sqrt(2) times the vectors of the test
    # above, and whose means are the logits.
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    maps = jnp.stack([1 - x, 1 + x], axis=1)[:, None]
    loss = pred_sim.PredSim(Given(), classes=2, weight=0.75, kernel=0)
    local = loss.apply({}, maps, {"label": LABEL}, {}, train=True)
    np.testing.assert_allclose(local.loss, 0.25 * math.log(2) + 0.75 * 16 / 9, rtol=1e-6)
    np.testing.assert_allclose(local.metrics["similarity"], (16 / 3, 3.0), rtol=1e-6)
    assert local.metrics["accuracy"][1] == 3
    without = loss.clone(weight=0.0).apply({}, maps, {"label": LABEL}, {}, train=True)
    np.testing.assert_allclose(
        without.loss, cross_entropy(Given().apply({}, maps, True), LABEL), rtol=1e-6
    )


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(4, 6, 6, 8), (4, 1, 1, 8), (4, 5, 8), (4, 8)])
def test_pred_sim_accepts_maps_tokens_and_features(shape):
    loss, x = pred_sim.PredSim(Given(), classes=2, pool=2), jnp.ones(shape)
    context = {"label": jnp.array([0, 1, 0, 1])}
    variables = loss.init(jax.random.key(0), x, context, {}, train=True)
    kernel = variables["params"]["similar"]["kernel"]
    assert kernel.shape == ((3, 3, 8, 8) if len(shape) == 4 else (8, 8))
    gradient = jax.grad(lambda x: loss.apply(variables, x, context, {}, train=True).loss)(x)
    assert np.isfinite(gradient).all()  # also where all values are equal


# Reconstruction and contrast


def test_pred_sim_pools_in_front_of_its_convolution():
    x, label = jax.random.normal(jax.random.key(1), (3, 4, 2, 3)), LABEL
    given = {"classes": 2, "weight": 1.0, "kernel": 1}
    pooled, plain = pred_sim.PredSim(Given(), pool=2, **given), pred_sim.PredSim(Given(), **given)
    variables = plain.init(jax.random.key(0), x, {"label": label}, {}, train=False)
    averages = x.reshape(3, 2, 2, 1, 2, 3).mean(axis=(2, 4))
    one = pooled.apply(variables, x, {"label": label}, {}, train=False).loss
    other = plain.apply(variables, averages, {"label": label}, {}, train=False).loss
    np.testing.assert_allclose(one, other, rtol=1e-6)
    unpooled = plain.apply(variables, x, {"label": label}, {}, train=False).loss
    assert abs(float(unpooled) - float(one)) > 1e-3
    # A 1x1 convolution multiplies each place by its matrix.
    matrix = variables["params"]["similar"]["kernel"][0, 0]
    by_hand = pred_sim.similarity_loss(
        pred_sim.deviation((averages @ matrix).reshape(3, 2, 3)), label, 2
    )
    np.testing.assert_allclose(one, by_hand, rtol=1e-5)


def test_interpolation_joins_the_corners():
    thirds = [[1, 0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0, 1]]
    np.testing.assert_allclose(info_pro.interpolation(2, 4), thirds, rtol=1e-12)
    np.testing.assert_allclose(info_pro.interpolation(1, 3), np.ones((3, 1)))
    np.testing.assert_allclose(info_pro.interpolation(5, 5), np.eye(5))


def test_reconstruction_error_by_hand():
    # Logits 0 and log 3 are the values 1/2 and 3/4. The image is 1 and 0 before normalization, and
    # the value above 1 is cut off.
    logits = jnp.array([0.0, math.log(3)]).reshape(1, 1, 2, 1)
    image = jnp.array([4.0, -1.0]).reshape(1, 1, 2, 1)
    error = info_pro.reconstruction_error(logits, image, (0.5,), (0.5,))
    np.testing.assert_allclose(error, (math.log(2) + math.log(4)) / 2, rtol=1e-6)


def test_contrastive_loss_by_hand():
    # The first two examples are of one class and orthogonal; the third equals the first and has no
    # partner. At temperature 1: log((1 + e) / 1) for the first, log(1 + 1) for the second.
    x = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    loss = info_pro.contrastive_loss(x, np.array([0, 0, 1]), 1.0)
    np.testing.assert_allclose(loss, (math.log(1 + math.e) + math.log(2)) / 2, rtol=1e-6)
    hotter = info_pro.contrastive_loss(x, np.array([0, 0, 1]), 2.0)
    np.testing.assert_allclose(hotter, (math.log(1 + math.exp(0.5)) + math.log(2)) / 2, rtol=1e-6)
    alone = info_pro.contrastive_loss(x, np.array([0, 1, 2]), 1.0)
    assert float(alone) == 0.0


def test_decoder_by_hand():
    # Taps in the middle only: the 3x3 convolutions sum the channels at each place.
    taps = np.zeros((3, 3, 2, 12)), np.zeros((3, 3, 12, 1))
    for weights in taps:
        weights[1, 1] = 1 / 12 if weights is taps[1] else 1
    decoder = info_pro.Decoder((2, 3, 1))
    x = jnp.array([[[1.0, 2.0], [5.0, 6.0]]])[None]  # one row of two places
    variables = decoder.init(jax.random.key(0), x, train=False)
    kernels = iter(taps)

    def chosen(path, p):
        if p.ndim == 4:
            return jnp.asarray(next(kernels))
        return p if path[-1].key == "scale" else jnp.zeros_like(p)

    params = jax.tree_util.tree_map_with_path(chosen, variables["params"])
    logits = decoder.apply(variables | {"params": params}, x, train=False)
    np.testing.assert_allclose(logits[0, :, :, 0], [[3, 7, 11]] * 2, rtol=1e-4)


@pytest.mark.medium
def test_info_pro_weights_both_terms_and_fades_linearly():
    made = [make("info_pro", inputs(k + 1, k, 4), task_weights=(0.5, 1.5)) for k in range(3)]
    assert [(m.reconstruction, m.task) for m in made] == [(5.0, 0.5), (2.5, 1.0), (0.0, 1.5)]
    assert [m.needs for m in made] == [("label", "image"), ("label", "image"), ("label",)]
    assert isinstance(make("info_pro", inputs(6, 3, 4)), Classifier)
    (first,) = (make("info_pro", inputs(3, 0, 2)),)
    assert (first.reconstruction, first.task) == (5.0, 0.5)  # two modules: the first weights

    loss = InfoPro(Given(), 2.0, 0.5, mean=(0.5,), std=(0.5,))
    x, context = jnp.ones((3, 2, 2, 2)), {"label": LABEL, "image": jnp.ones((3, 4, 4, 1))}
    variables = loss.init(jax.random.key(0), x, context, {}, train=False)
    variables = jax.tree.map(jnp.zeros_like, variables)  # the decoder's logits are 0
    local = loss.apply(variables, x, context, {}, train=False)
    np.testing.assert_allclose(local.loss, 2 * math.log(2) + 0.5 * math.log(2), rtol=1e-6)
    assert local.predictions.shape == (3, 2)


def test_module_without_task_weight_is_an_auto_encoder():
    made = make("info_pro", inputs(1, 0, 3), task_weights=(0.0, 1.0))
    assert made.head is None
    assert made.needs == ("image",)
    x, context = jnp.ones((2, 8, 8, 4)), {"image": jnp.ones((2, 32, 32, 3))}
    variables = made.clone(mean=(0.5,) * 3, std=(0.5,) * 3)
    local, _ = variables.init_with_output(jax.random.key(0), x, context, {}, train=False)
    assert local.predictions is None
    assert set(local.metrics) == {"loss", "reconstruction"}
    assert made.predict(x, {}, False) is None


# Auxiliary networks


def test_auxiliary_blocks_are_spread_to_the_last_block():
    assert auglocal.chosen_blocks(1, 6, 1) == [5]
    assert auglocal.chosen_blocks(1, 6, 5) == auglocal.chosen_blocks(1, 6, 9) == [1, 2, 3, 4, 5]
    assert auglocal.chosen_blocks(2, 8, 3) == [3, 5, 7]
    assert auglocal.chosen_blocks(5, 6, 3) == [5]
    assert [auglocal.pyramid_depth(5, place) for place in (0.0, 0.5, 1.0)] == [5, 4, 3]


def test_auxiliary_network_makes_up_for_poolings_that_it_skips():
    # cnn6 of width 4 has channels 4, 8, 8, 16, 16, 16 and pools before its 2nd and 4th block.
    made = make("auglocal", inputs(1), depth=1)
    assert [(block.features, block.pool) for block in made.auxiliary] == [(16, True)]
    made = make("auglocal", inputs(1), depth=3)  # like blocks 2, 3 and 5
    assert [(b.features, b.pool) for b in made.auxiliary] == [(8, True), (16, True), (16, False)]
    made = make("auglocal", inputs(3), depth=2, widen=0.5)  # like blocks 4 and 5
    assert [(b.features, b.pool) for b in made.auxiliary] == [(8, True), (8, False)]
    strided = make("auglocal", inputs(2, network="resnet20"), depth=2)  # like blocks 5 and 9
    assert [(b.features, b.stride) for b in strided.auxiliary] == [(8, 2), (16, 2)]
    assert isinstance(make("auglocal", inputs(6)), Classifier)
    with pytest.raises(UserError, match="block 1 of the network is Given, which has no"):
        auglocal.auxiliary_blocks((Given(), Given()), 1, [1], widen=2.0)


def test_auxiliary_blocks_halve_maps_like_convolutions_of_flax():
    """Leaves out a block that halves the map, in whose place the auxiliary block halves it."""
    blocks = [nn.Conv(4, (3, 3), strides=s) for s in (1, (2, 2), None, 1)]
    (made,) = auglocal.auxiliary_blocks(blocks, 1, [3], 1.0)
    assert made.strides == 2
    (made,) = auglocal.auxiliary_blocks([*blocks[:3], blocks[1].clone(strides=(1, 1))], 1, [3], 1.0)
    assert made.strides == (2, 2)
    with pytest.raises(UserError, match=r"Conv\.strides=\(2, 1\); the auxiliary blocks need"):
        auglocal.auxiliary_blocks([blocks[0], nn.Conv(4, (3, 3), strides=(2, 1))], 1, [1], 1.0)


def test_auxiliary_blocks_that_cannot_follow_each_other_are_refused():
    class Down(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x, train):
            return nn.Conv(self.features, (3, 3))(x)

    class Residual(Down):
        @nn.compact
        def __call__(self, x, train):
            return x + nn.Conv(self.features, (3, 3))(x)

    blocks = [Down(4), Residual(4), Down(8), Residual(8)]
    known = inputs(1)
    at = dataclasses.replace(known, blocks=blocks, head=Given())
    x, context = jnp.ones((2, 8, 8, 4)), {"label": jnp.zeros(2, jnp.int32)}
    made = {d: make("auglocal", at, depth=d) for d in (1, 3)}
    assert made[3].init_with_output(jax.random.key(0), x, context, {}, train=False)[0].loss > 0
    with pytest.raises(UserError, match=r"block 0 \(Residual\).* a larger objective\.depth"):
        made[1].init(jax.random.key(0), x, context, {}, train=False)


def test_pyramid_follows_the_modules():
    depths = [
        len(make("auglocal", inputs(k + 1, k, 6), depth=3, pyramid=True).auxiliary)
        for k in range(5)
    ]
    assert depths == [3, 3, 2, 2, 1]  # round(3 - k / 4), and a single block follows the last one


@pytest.mark.medium
def test_momentum_block_is_added_to_a_block_of_the_same_shape():
    made = make("auglocal", inputs(1), depth=2, momentum_block=True, widen=2.0)
    assert [(b.features, b.pool) for b in made.auxiliary] == [(8, True), (32, True)]
    assert made.momentum == inputs(1).blocks[1]
    assert made.reads == ("next_block",)
    assert make("auglocal", inputs(1)).reads == ()

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    only = made.clone(head=Given(), auxiliary=made.auxiliary[:1])
    next_block = made.momentum.init(jax.random.key(2), x, train=False)
    published = {"next_block": next_block}
    variables = only.init(jax.random.key(3), x, {"label": LABEL[:2]}, published, train=False)
    predict = lambda **read: only.apply(variables, x, read, train=False, method="predict")  # noqa: E731
    expected = predict() + Given().apply({}, made.momentum.apply(next_block, x, train=False), False)
    np.testing.assert_allclose(predict(**published), expected, rtol=1e-5)
    assert np.abs(predict(**published) - predict()).max() > 1e-2
    # Its running averages are its own, not the next module's, which are of other inputs.
    other = next_block | {"batch_stats": jax.tree.map(lambda v: v + 5, next_block["batch_stats"])}
    np.testing.assert_array_equal(predict(next_block=other), predict(**published))
    arguments = x, {"label": LABEL[:2]}, {"next_block": other}
    _, updated = only.apply(variables, *arguments, train=True, mutable=["batch_stats"])
    _, expected = made.momentum.apply(next_block, x, train=True, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal,
        updated["batch_stats"]["momentum_averages"],
        expected["batch_stats"],
    )


def test_dropped_channels_of_a_narrower_residual_block():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    block = BasicBlock(4, padded=True)
    variables = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(0), x, train=False))
    np.testing.assert_array_equal(block.apply(variables, x, train=False), x[..., :4])


# Transport


def test_transport_by_hand():
    sown = {
        "block_0": {"residual": (jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]),)},
        "block_1": {"other": (jnp.ones((3, 2)),)},
    }
    loss = Transport(Classifier(Given()), 0.5)
    x, context = jnp.zeros((3, 1, 2)), {"label": LABEL}
    local = loss.apply({}, x, context, {"intermediates": sown}, train=True)
    np.testing.assert_allclose(local.loss, math.log(2) + 0.5 * 14 / 6, rtol=1e-6)
    np.testing.assert_allclose(local.metrics["transport"], (7.0, 3.0), rtol=1e-6)
    assert loss.reads == ("intermediates",)
    assert loss.needs == ("label",)
    wrapped = Transport(make("auglocal", inputs(1), momentum_block=True, refresh_every=3), 1.0)
    assert wrapped.reads == ("next_block", "intermediates")
    assert (wrapped.decay, wrapped.refresh) == (0.995, 3)


def test_residual_is_what_a_block_adds():
    block, x = BasicBlock(4, padded=True), jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    variables = block.init(jax.random.key(1), x, train=False)
    y, sown = block.apply(variables, x, train=False, mutable=["intermediates"])
    (residual,) = residuals({"block_3": sown["intermediates"]})
    np.testing.assert_allclose(y, jax.nn.relu(x + residual), rtol=1e-6)
    shorter = BasicBlock(4, stride=2, padded=True)
    _, sown = shorter.apply(variables, x, train=False, mutable=["intermediates"])
    assert "intermediates" not in sown  # no residual if the shape changes
