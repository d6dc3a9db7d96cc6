"""`ops="xla"` gives the numbers of `auto` and has the derivatives that `auto` lacks: forward mode and second order."""

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
from dgl_jax.models.network import with_ops
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

# Blocks in front of a head. With those channels and inputs `auto` takes each formulation of a CPU.
BODIES = {
    "pool": [ConvBlock(8, pool=True)],
    "cnn": [ConvBlock(6), ConvBlock(8, pool=True)],
    "winograd": [ConvBlock(32), ConvBlock(32)],
    "basic": [ConvBlock(4, bias=False), BasicBlock(8, stride=2), BasicBlock(8, padded=True)],
    "bottleneck": [Stem(4), Bottleneck(2)],
}
# One of them is among the fast tests, as it is and recomputed.
CASES = [
    *(
        pytest.param(name, False, marks=() if name == "cnn" else pytest.mark.slow)
        for name in BODIES
    ),
    ("cnn", True),
]


def module(name, ops, remat=False):
    *blocks, head = (
        with_ops(part, ops) for part in (*BODIES[name], MLPHead(CLASSES, convs=1, hidden=1))
    )
    return LocalModule("module_0", 0, tuple(blocks), Classifier(head), remat, ops)


@cache
def drawn(name):
    """Parameters, batch statistics, inputs, labels, and a direction in the space of the parameters."""
    random, own = np.random.default_rng(0), module(name, "auto")
    params, stats = jax.eval_shape(
        lambda: own.init(
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


def loss_of(own, name, some=np.s_[:]):
    """The loss of some of the examples as a function of the parameters."""
    _, stats, x, labels, _ = drawn(name)
    x, labels = x[some], labels[some]

    def loss(params):
        outputs, _ = own.apply_body(params, stats, x, train=True)
        return own.apply_objective(params, stats, outputs, {"label": labels}, train=True)[0].loss

    return loss


def hessian_products(loss, params, direction):
    """The Hessian times a direction, forward over reverse and reverse over reverse."""

    def along(params):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)))

    return jax.jit(lambda p: (jax.jvp(jax.grad(loss), (p,), (direction,))[1], jax.grad(along)(p)))(
        params
    )


def furthest(found, right):
    """Largest distance of two pytrees, in units of the largest value of each array, or of all if that is near 0."""
    largest = max(np.abs(b).max() for b in jax.tree.leaves(right))
    distances = jax.tree.map(
        lambda a, b: np.abs(np.float64(a) - b).max() / max(np.abs(b).max(), 1e-2 * largest),
        found,
        right,
    )
    return max(jax.tree.leaves(distances))


# The numbers


@pytest.mark.parametrize("name", BODIES)
def test_values_and_gradients_are_those_of_auto(name):
    params = drawn(name)[0]
    auto, xla = (
        jax.jit(jax.value_and_grad(loss_of(module(name, ops), name)))(params) for ops in OPS
    )
    assert furthest(xla, auto) < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_evaluation_of_heads_is_that_of_auto(head, dtype):
    x = np.random.default_rng(0).normal(size=(4, 12, 12, 6)).astype(dtype)
    variables = random_variables(make_head(head, CLASSES, dtype), x.shape)
    auto, xla = (
        jax.jit(partial(make_head(head, CLASSES, dtype, ops).apply, train=False))(variables, x)
        for ops in OPS
    )
    assert furthest(xla, auto) < (1e-5 if dtype == "float32" else 2e-2)


class Library(nn.Module):
    """Computes `ConvBlock(8, pool=True)` with the layers of flax."""

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
def test_second_derivatives_are_those_of_flax():
    params, *_, direction = drawn("pool")
    ours = module("pool", "xla")
    library = dataclasses.replace(ours, blocks=(Library(),))
    found, right = (
        hessian_products(loss_of(each, "pool"), params, direction)[0] for each in (ours, library)
    )
    assert furthest(found, right) < 1e-4


# The derivatives


@pytest.mark.parametrize(("name", "remat"), CASES)
def test_forward_mode_is_reverse_mode(name, remat):
    params, *_, direction = drawn(name)
    loss = loss_of(module(name, "xla", remat), name)
    forward = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(params, direction)
    gradient = jax.jit(jax.grad(loss_of(module(name, "auto"), name)))(
        params
    )  # by the custom gradients
    reverse = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


@pytest.mark.parametrize(("name", "remat"), CASES)
def test_hessian_products_agree(name, remat):
    params, *_, direction = drawn(name)
    one, other = hessian_products(loss_of(module(name, "xla", remat), name), params, direction)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one)) > 1e-2
    assert furthest(one, other) < 1e-3


def test_every_derivative_of_a_small_matrix():
    """The whole Hessian, of which a product shows one column."""
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
def test_a_step_in_micro_batches_has_a_tangent():
    """The whole of `local_step`, with what orders its micro-batches and the optimizer."""
    own, optimizer = module("pool", "xla", remat=True), optax.sgd(0.1)
    params, stats, x, labels, direction = drawn("pool")
    key = jax.random.key(0)

    def after_one(params):
        state = ModuleState(params, stats, optimizer.init(params), key, jnp.int32(0))
        new, _, _ = local_step(own, optimizer, state, x, {"label": labels}, accumulate=2)
        return new.params

    tangent = jax.jit(lambda p, d: jax.jvp(after_one, (p,), (d,))[1])(params, direction)
    # Of p - 0.1 g(p): the direction less a tenth of the Hessian's product.
    losses = [loss_of(dataclasses.replace(own, remat=False), "pool", np.s_[i::2]) for i in range(2)]
    gradient = jax.grad(lambda params: (losses[0](params) + losses[1](params)) / 2)
    product = jax.jit(lambda p, d: jax.jvp(gradient, (p,), (d,))[1])(params, direction)
    expected = jax.tree.map(lambda d, h: d - 0.1 * h, direction, product)
    assert furthest(tangent, expected) < 1e-4


# What `auto` lacks

OPERATIONS = {
    "convolution": lambda x, ops: CONVOLVE(x, jnp.ones((3, 3, 3, 4)), ops=ops),
    "batch norm": lambda x, ops: BatchNorm(ops=ops).init_with_output(jax.random.key(0), x, True)[0],
    "2x2 maximum": lambda x, ops: max_pool_2x2(x, ops=ops),
    "recomputed": lambda x, ops: recomputed(lambda p, x, _: (p * x, ()), ops=ops)(x, x, ())[0],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_needs_xla(name):
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


OURS = {"custom_vjp_call", "custom_vjp_call_jaxpr", "platform_index"}


def ours(function, *args):
    """Returns what a program holds besides operations that have every derivative and are the same on all platforms."""
    return OURS & {
        equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)
    }


@pytest.mark.parametrize(
    "name",
    [
        "cnn4",
        "resnet50",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg11", "resnet18", "resnet20")),
    ],
)
def test_networks_hold_nothing_else(name):
    def found(ops):
        network = make_network(name, 4, CLASSES, (32, 32, 3), ops=ops)
        heads = [make_head(head, CLASSES, ops=ops) for head in HEADS]
        parts, x, names = (
            [*network.blocks[:4], *network.blocks[-1:]],
            jnp.zeros((2, 32, 32, 3)),
            set(),
        )
        for part in parts:
            for each in (part, *heads, network.classifier):
                apply = lambda v, x, each=each: each.apply(v, x, True, mutable=["batch_stats"])[0]  # noqa: E731
                variables = jax.eval_shape(
                    lambda x, each=each: each.init(jax.random.key(0), x, True), x
                )
                names |= ours(apply, variables, x)
            x = jax.eval_shape(
                lambda x, part=part: part.init_with_output(jax.random.key(0), x, True)[0], x
            )
        return names

    assert found("xla") == set()
    assert len(found("auto")) > 1


# The choice


def test_another_choice_is_another_module():
    one, other = (make_network("resnet20", 4, CLASSES, (32, 32, 3), ops=ops) for ops in OPS)
    assert one != other
    assert one == make_network("resnet20", 4, CLASSES, (32, 32, 3))
    assert all(block.ops == "xla" for block in (*other.blocks, other.classifier))
    assert hash(other) == hash(make_network("resnet20", 4, CLASSES, (32, 32, 3), ops="xla"))


def test_a_jitted_function_of_a_module_is_traced_for_each_choice():
    trace = jax.jit(
        lambda own, v, x: own.apply(v, x, True, mutable=["batch_stats"])[0], static_argnums=0
    )
    x = jnp.ones(SHAPE)
    variables = ConvBlock(4).init(jax.random.key(0), x, True)
    programs = [trace.lower(with_ops(ConvBlock(4), ops), variables, x) for ops in OPS]
    convolutions = [program.as_text().count("stablehlo.convolution") for program in programs]
    assert convolutions == [0, 1]  # `auto` multiplies matrices here


class Several(nn.Module):
    """A block of the user's with layers of the package's in its fields, and a field of the same name and another meaning."""

    layers: tuple[nn.Module, ...]
    ops: int = 3

    @nn.compact
    def __call__(self, x, train):
        for layer in self.layers:
            x = layer(x, train)
        return x


def test_blocks_of_the_users_own_follow_the_setting():
    several = Several((ConvBlock(4), ConvBlock(4)))
    found = with_ops(several, "xla")
    assert found == Several((ConvBlock(4, ops="xla"), ConvBlock(4, ops="xla")))
    assert found.ops == 3
    assert with_ops(several, "auto") == several
    assert with_ops(ConvBlock(4, ops="xla"), "auto").ops == "xla"  # as the user wrote it


def test_there_are_two():
    x = jnp.ones(SHAPE)
    for function in (
        lambda: max_pool_2x2(x, ops="XLA"),
        lambda: with_ops(ConvBlock(4), "cpu"),
        lambda: CONVOLVE(x, x, ops=""),
    ):
        with pytest.raises(ValueError, match="there are auto, xla"):
            function()
    (field,) = (f for f in dataclasses.fields(ModelSettings) if f.name == "ops")
    assert field.metadata["choices"] == OPS


def test_a_run_learns_the_same():
    """Three updates in each formulation, and the setting reaches all parts of the modules."""

    def run(ops):
        config = small_config(
            model__ops=ops, engine__name="fused", train__steps=3, data__augment="none"
        )
        made = make_experiment(make_settings(config))
        for own in made.spec.modules:
            assert {part.ops for part in (own, *own.blocks, own.objective.head)} == {ops}
        reports = list(made.engine.run(made.engine.init(), made.source, 3))
        return [
            np.asarray(leaf)
            for each in reports[-1].snapshot().modules
            for leaf in jax.tree.leaves(each.params)
        ]

    assert furthest(run("xla"), run("auto")) < 1e-5
