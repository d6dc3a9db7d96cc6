"""Tests that `ops="xla"` equals `auto`, and supports forward mode and second derivatives."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpy_layers import random_variables
from runs import small_config
from traced import equations

from dgl_jax.config import ModelSettings, make_settings
from dgl_jax.core.module import LocalModule, ModuleState
from dgl_jax.core.step import local_step
from dgl_jax.models import HEADS, make_head, make_network
from dgl_jax.models.blocks import ConvBlock
from dgl_jax.models.heads import MLPHead
from dgl_jax.models.network import with_choices
from dgl_jax.models.resnet import BasicBlock, Bottleneck, Stem
from dgl_jax.objectives import Classifier
from dgl_jax.ops import (
    OPS,
    BatchNorm,
    adaptive_avg_pool,
    conv_general_dilated,
    max_pool_2x2,
    max_pool_3x3,
    recomputed,
)
from dgl_jax.ops.batch_norm import normalize
from dgl_jax.run.build import make_experiment

CONVOLVE = partial(
    conv_general_dilated, strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)
SHAPE, CLASSES = (8, 8, 8, 3), 5

# Blocks before a head. With these channels and inputs, `auto` uses every CPU formulation.
BODIES = {
    "pool": [ConvBlock(8, pool=True)],
    "cnn": [ConvBlock(6), ConvBlock(8, pool=True)],
    "winograd": [ConvBlock(32), ConvBlock(32)],
    "basic": [ConvBlock(4, bias=False), BasicBlock(8, stride=2), BasicBlock(8, padded=True)],
    "bottleneck": [Stem(4), Bottleneck(2)],
}
# Bodies and `remat`. One body belongs to the fast tests, with and without recomputation.
CASES = [
    *(
        pytest.param(name, False, marks=() if name == "cnn" else pytest.mark.slow)
        for name in BODIES
    ),
    ("cnn", True),
]


def module(name, ops, remat=False):
    *blocks, head = (
        with_choices(part, ops=ops) for part in (*BODIES[name], MLPHead(CLASSES, convs=1, hidden=1))
    )
    return LocalModule("module_0", 0, tuple(blocks), Classifier(head), remat, ops)


@cache
def drawn(name):
    """Returns random parameters, batch statistics, inputs, labels, and a parameter direction."""
    random, described = np.random.default_rng(0), module(name, "auto")
    params, stats = jax.eval_shape(
        lambda: described.init(
            jax.random.key(0),
            jax.ShapeDtypeStruct(SHAPE, "float32"),
            {"label": jax.ShapeDtypeStruct(SHAPE[:1], "int32")},
        )
    )
    params, direction = (
        jax.tree.map(lambda p: random.normal(0, 0.4, p.shape).astype(p.dtype), params)
        for _ in range(2)
    )
    stats = jax.tree.map(lambda s: random.uniform(0.5, 1.5, s.shape).astype(s.dtype), stats)
    x = random.normal(size=SHAPE).astype(np.float32)
    return params, stats, x, jnp.asarray(random.integers(0, CLASSES, SHAPE[0])), direction


def loss_of(local_module, name, examples=np.s_[:]):
    """Returns the loss of the selected examples as a function of the parameters."""
    _, stats, x, labels, _ = drawn(name)
    x, context = x[examples], {"label": labels[examples]}

    def loss(params):
        outputs, _ = local_module.apply_body(params, stats, x, train=True)
        return local_module.apply_objective(params, stats, outputs, context, train=True)[0].loss

    return loss


def hessian_products(loss, params, direction):
    """Returns the Hessian times a direction, forward over reverse and reverse over reverse."""

    def along(params):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)))

    return jax.jit(lambda p: (jax.jvp(jax.grad(loss), (p,), (direction,))[1], jax.grad(along)(p)))(
        params
    )


def relative_error(actual, expected):
    """Returns the largest difference of two pytrees.

    It is relative to the largest value of each array, or of all arrays if that is near 0.
    """
    largest = max(np.abs(b).max() for b in jax.tree.leaves(expected))
    distances = jax.tree.map(
        lambda a, b: np.abs(np.float64(a) - b).max() / max(np.abs(b).max(), 1e-2 * largest),
        actual,
        expected,
    )
    return max(jax.tree.leaves(distances))


# Values and first derivatives


@pytest.mark.medium
@pytest.mark.parametrize("name", BODIES)
def test_xla_values_and_gradients_equal_auto(name):
    params = drawn(name)[0]
    auto, xla = (
        jax.jit(jax.value_and_grad(loss_of(module(name, ops), name)))(params) for ops in OPS[:2]
    )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(auto))
    pairs = list(zip(jax.tree.leaves(xla), jax.tree.leaves(auto), strict=True))
    # The gradient of a bias in front of a batch norm is exactly 0, so that only rounding is left.
    zero = [max(np.abs(a).max(), np.abs(b).max()) < 1e-6 * largest for a, b in pairs]
    assert sum(zero) < len(pairs) / 4
    nonzero = [pair for pair, vanishes in zip(pairs, zero, strict=True) if not vanishes]
    assert relative_error(*map(list, zip(*nonzero))) < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_xla_evaluation_of_heads_equals_auto(head, dtype):
    x = np.random.default_rng(0).normal(size=(4, 12, 12, 6)).astype(dtype)
    variables = random_variables(make_head(head, CLASSES, dtype), x.shape)
    auto, xla = (
        jax.jit(partial(make_head(head, CLASSES, dtype, ops).apply, train=False))(variables, x)
        for ops in OPS[:2]
    )
    assert relative_error(xla, auto) < (1e-5 if dtype == "float32" else 2e-2)


class FlaxBlock(nn.Module):
    """Reference of `ConvBlock(8, pool=True)` with the layers of flax."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(8, (3, 3), padding=1, name="Conv_0")(x)
        return nn.relu(
            nn.BatchNorm(
                use_running_average=not train, momentum=0.9, epsilon=1e-5, name="BatchNorm_0"
            )(x)
        )


@pytest.mark.slow
def test_xla_second_derivatives_equal_flax():
    params, *_, direction = drawn("pool")
    tested = module("pool", "xla")
    reference = dataclasses.replace(tested, blocks=(FlaxBlock(),))
    actual, expected = (
        hessian_products(loss_of(each, "pool"), params, direction)[0]
        for each in (tested, reference)
    )
    assert relative_error(actual, expected) < 1e-4


# Forward mode and second derivatives


@pytest.mark.parametrize(("name", "remat"), CASES)
def test_xla_forward_mode_equals_custom_gradients(name, remat):
    params, *_, direction = drawn(name)
    loss = loss_of(module(name, "xla", remat), name)
    forward = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(params, direction)
    gradient = jax.jit(jax.grad(loss_of(module(name, "auto"), name)))(params)
    reverse = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize(("name", "remat"), CASES)
def test_hessian_products_by_forward_and_reverse_mode_agree(name, remat):
    params, *_, direction = drawn(name)
    forward, reverse = hessian_products(
        loss_of(module(name, "xla", remat), name), params, direction
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(forward)) > 1e-2
    assert relative_error(forward, reverse) < 1e-3


def test_full_hessian_of_a_small_kernel_is_symmetric():
    """Checks all columns of a Hessian; a product with a direction shows only one combination."""
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)

    def loss(kernel):
        y = CONVOLVE(x, kernel, ops="xla")
        y, *_ = normalize(y, jnp.ones(2), jnp.zeros(2), True, "xla")
        y = max_pool_3x3(max_pool_2x2(y, ops="xla"), ops="xla")
        return (adaptive_avg_pool(y, (1, 1), ops="xla") ** 3).sum()

    kernel = np.random.default_rng(1).normal(size=(3, 3, 1, 2)).astype(np.float32)
    hessian = jax.jit(jax.hessian(loss))(kernel).reshape(18, 18)
    assert np.abs(hessian).max() > 1e-2
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4 * np.abs(hessian).max())
    twice = jax.jit(jax.jacrev(jax.grad(loss)))(kernel).reshape(18, 18)
    np.testing.assert_allclose(hessian, twice, atol=1e-4 * np.abs(hessian).max())


@pytest.mark.slow
def test_local_step_with_micro_batches_has_a_tangent():
    """Differentiates all of `local_step`, including the ordered micro-batches and the optimizer."""
    local_module, optimizer = module("pool", "xla", remat=True), optax.sgd(0.1)
    params, stats, x, labels, direction = drawn("pool")
    key = jax.random.key(0)

    def after_one(params):
        state = ModuleState(params, stats, optimizer.init(params), key, jnp.int32(0))
        new, _, _ = local_step(local_module, optimizer, state, x, {"label": labels}, accumulate=2)
        return new.params

    tangent = jax.jit(lambda p, d: jax.jvp(after_one, (p,), (d,))[1])(params, direction)
    # The tangent of p - 0.1 g(p) is the direction minus 0.1 times the Hessian product.
    stored = dataclasses.replace(local_module, remat=False)
    losses = [loss_of(stored, "pool", np.s_[i::2]) for i in range(2)]
    gradient = jax.grad(lambda params: (losses[0](params) + losses[1](params)) / 2)
    product = jax.jit(lambda p, d: jax.jvp(gradient, (p,), (d,))[1])(params, direction)
    expected = jax.tree.map(lambda d, h: d - 0.1 * h, direction, product)
    assert relative_error(tangent, expected) < 1e-4


# Derivatives that `auto` does not support

OPERATIONS = {
    "convolution": lambda x, ops: CONVOLVE(x, jnp.ones((3, 3, 3, 4)), ops=ops),
    "batch norm": lambda x, ops: BatchNorm(ops=ops).init_with_output(jax.random.key(0), x, True)[0],
    "2x2 maximum": lambda x, ops: max_pool_2x2(x, ops=ops),
    "recomputed": lambda x, ops: recomputed(lambda p, x, _: (p * x, ()), ops=ops)(x, x, ())[0],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_of_an_operation_needs_xla(name):
    x = jnp.ones(SHAPE)
    jax.jvp(partial(OPERATIONS[name], ops="xla"), (x,), (x,))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(partial(OPERATIONS[name], ops="auto"), (x,), (x,))


@pytest.mark.parametrize("remat", [False, True])
def test_forward_mode_of_a_module_needs_xla(remat):
    params, *_, direction = drawn("cnn")
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(
            lambda p, d: jax.jvp(loss_of(module("cnn", "auto", remat), "cnn"), (p,), (d,))
        ).lower(params, direction)


CUSTOM = {"custom_vjp_call", "custom_vjp_call_jaxpr", "platform_index"}


def custom_primitives(function, *args):
    """Returns the primitives of custom gradients and of choices by platform in a program."""
    return CUSTOM & {
        equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)
    }


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    [
        "cnn4",
        "resnet50",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg11", "resnet18", "resnet20")),
    ],
)
def test_networks_with_xla_contain_no_custom_primitives(name):
    def all_custom_primitives(ops):
        network = make_network(name, 4, CLASSES, (32, 32, 3), ops=ops)
        heads = [make_head(head, CLASSES, ops=ops) for head in HEADS]
        x, names = jnp.zeros((2, 32, 32, 3)), set()
        for part in (*network.blocks[:4], *network.blocks[-1:]):
            for each in (part, *heads, network.classifier):
                variables = jax.eval_shape(
                    lambda x, each=each: each.init(jax.random.key(0), x, True), x
                )
                names |= custom_primitives(
                    lambda v, x, each=each: each.apply(v, x, True, mutable=["batch_stats"])[0],
                    variables,
                    x,
                )
            x = jax.eval_shape(
                lambda x, part=part: part.init_with_output(jax.random.key(0), x, True)[0], x
            )
        return names

    assert all_custom_primitives("xla") == set()
    assert len(all_custom_primitives("auto")) > 1


# The choice of a formulation


def test_networks_with_other_ops_are_unequal_and_hashable():
    auto, xla = (make_network("resnet20", 4, CLASSES, (32, 32, 3), ops=ops) for ops in OPS[:2])
    assert auto != xla
    assert auto == make_network("resnet20", 4, CLASSES, (32, 32, 3))
    assert all(block.ops == "xla" for block in (*xla.blocks, xla.classifier))
    assert hash(xla) == hash(make_network("resnet20", 4, CLASSES, (32, 32, 3), ops="xla"))


def test_jitted_function_of_a_block_is_traced_for_each_formulation():
    trace = jax.jit(
        lambda block, v, x: block.apply(v, x, True, mutable=["batch_stats"])[0], static_argnums=0
    )
    x = jnp.ones(SHAPE)
    variables = ConvBlock(4).init(jax.random.key(0), x, True)
    programs = [trace.lower(with_choices(ConvBlock(4), ops=ops), variables, x) for ops in OPS[:2]]
    convolutions = [program.as_text().count("stablehlo.convolution") for program in programs]
    assert convolutions == [0, 1]  # `auto` uses a matrix product here


class Several(nn.Module):
    """User's block with layers of the package in a field, and an unrelated field named `ops`."""

    layers: tuple[nn.Module, ...]
    ops: int = 3

    @nn.compact
    def __call__(self, x, train):
        for layer in self.layers:
            x = layer(x, train)
        return x


def test_with_choices_sets_the_layers_in_fields_of_user_blocks():
    several = Several((ConvBlock(4), ConvBlock(4)))
    changed = with_choices(several, ops="xla")
    assert changed == Several((ConvBlock(4, ops="xla"), ConvBlock(4, ops="xla")))
    assert changed.ops == 3
    assert with_choices(several, ops="auto") == several
    assert with_choices(ConvBlock(4, ops="xla"), ops="auto").ops == "xla"  # the user's choice stays


def test_unknown_ops_are_refused():
    x = jnp.ones(SHAPE)
    for function in (
        lambda: max_pool_2x2(x, ops="XLA"),
        lambda: with_choices(ConvBlock(4), ops="cpu"),
        lambda: CONVOLVE(x, x, ops=""),
    ):
        with pytest.raises(ValueError, match="must be one of auto, xla"):
            function()
    (field,) = (f for f in dataclasses.fields(ModelSettings) if f.name == "ops")
    assert field.metadata["choices"] == OPS


@pytest.mark.medium
def test_runs_with_both_formulations_learn_the_same_parameters():
    """Makes three updates with each formulation, and checks that the setting reaches all parts."""

    def run(ops):
        config = small_config(
            model__ops=ops, engine__name="fused", train__steps=3, data__augment="none"
        )
        experiment = make_experiment(make_settings(config))
        for part in experiment.spec.modules:
            assert {layer.ops for layer in (part, *part.blocks, part.objective.head)} == {ops}
        engine = experiment.engine
        reports = list(engine.run(engine.init(), experiment.source, 3))
        return [
            np.asarray(leaf)
            for state in reports[-1].snapshot().modules
            for leaf in jax.tree.leaves(state.params)
        ]

    assert relative_error(run("xla"), run("auto")) < 1e-5
