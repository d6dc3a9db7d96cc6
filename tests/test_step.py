"""Tests of the update of a single module, against an independent implementation."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from beartype import beartype
from beartype.roar import BeartypeException
from jaxtyping import TypeCheckError, jaxtyped

from dgl_jax.core import step
from dgl_jax.core.module import LocalModule, init_states, make_modules
from dgl_jax.core.step import eval_step, local_step
from dgl_jax.models.blocks import ConvBlock
from dgl_jax.models.heads import HEADS, make_head
from dgl_jax.objectives import classifier, means

RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))
LABEL = np.array([0, 2, 1, 0], np.int32)
TARGETS = {"label": jnp.asarray(LABEL), "id": jnp.arange(4)}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def numbers(tree, seed):
    """Returns a tree of the same shapes with values drawn by NumPy.

    Golden values then depend neither on the initializers nor on JAX's generator.
    """
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), tree)


# Golden values


def conv_module(head):
    """Returns a convolutional module as in the paper, its state, and images."""
    module = LocalModule("module_0", 0, (ConvBlock(3),), classifier.Classifier(make_head(head, 3)))
    images = jax.ShapeDtypeStruct((4, 6, 6, 2), "float32")
    (state,) = jax.eval_shape(
        lambda key: init_states([module], OPTIMIZER, key, images), jax.random.key(0)
    )
    statistics = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state.batch_stats)
    params, velocity = numbers(state.params, 0), numbers(state.opt_state, 1)
    state = state.replace(
        params=params,
        batch_stats=statistics,
        opt_state=velocity,
        updates=jnp.int32(5),
        rng=jax.random.key(0),
    )
    return module, state, jnp.asarray(np.random.default_rng(2).normal(size=images.shape), "float32")


# By head: the loss, the sum of |new parameters|, and the sum of |changes of the parameters|.
GOLDEN = {
    "linear": (1.131134, 17.559287, 1.336307),
    "cnn": (1.171396, 69.865399, 5.977103),
    "conv5x5": (1.125739, 185.117627, 16.168326),
    "mlp": (1.066154, 153.757881, 13.172633),
    "mlp_sr": (1.195676, 164.495007, 14.567772),
}


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize("head", list(HEADS))
def test_local_step_equals_independent_implementation(head):
    module, state, images = conv_module(head)
    new, outputs, metrics = jax.jit(partial(local_step, module, OPTIMIZER))(state, images, TARGETS)

    # Blocks and head are applied with flax, the loss is its definition, and NumPy does the update.
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        body = {
            "params": params["body"]["block_0"],
            "batch_stats": state.batch_stats["body"]["block_0"],
        }
        x, block = module.blocks[0].apply(body, images, train=True, mutable=["batch_stats"])
        end = {"params": params["objective"], "batch_stats": state.batch_stats["objective"]}
        logits, head = module.objective.head.apply(end, x, train=True, mutable=["batch_stats"])
        exp = jnp.exp(logits)
        chosen = (exp / exp.sum(1, keepdims=True))[np.arange(4), LABEL]
        statistics = {
            "body": {"block_0": block["batch_stats"]},
            "objective": head.get("batch_stats", {}),
        }
        return -jnp.log(chosen).sum() / 4, (x, logits, statistics)

    (expected, (x, logits, statistics)), gradient = jax.jit(loss)(state.params)
    np.testing.assert_allclose(means(metrics)["loss"], expected, rtol=1e-5)
    assert float(means(metrics)["accuracy"]) == np.mean(np.argmax(logits, 1) == LABEL)
    np.testing.assert_allclose(outputs, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(new.batch_stats), flat(statistics), rtol=1e-5, atol=1e-6)
    velocity = MOMENTUM * flat(state.opt_state) + flat(gradient) + DECAY * flat(state.params)
    np.testing.assert_allclose(flat(new.opt_state), velocity, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        flat(new.params), flat(state.params) - RATE * velocity, rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(
        flat(new.opt_state), velocity - DECAY * flat(state.params), rtol=1e-4, atol=1e-5
    )
    assert int(new.updates) == 6

    # Golden values: later versions must compute the same numbers.
    after, before = flat(new.params).astype(np.float64), flat(state.params)
    measured = [float(means(metrics)["loss"]), np.abs(after).sum(), np.abs(after - before).sum()]
    np.testing.assert_allclose(measured, GOLDEN[head], rtol=1e-5)

    # The outputs belong to the forward pass before the update.
    later = module.apply_body(new.params, state.batch_stats, images, train=True)[0]
    assert not np.allclose(outputs, later, rtol=1e-3)


# The other tests use small dense modules.


class Block(nn.Module):
    features: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(self.features, kernel_init=self.kernel)(x))
        return nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x

    @staticmethod
    def kernel(key, shape, dtype):
        return jax.random.normal(key, shape, dtype)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x)


MODULES = make_modules([Block(5), Block(4), Block(3)], (0, 1, 2), [Head()] * 3)
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), "float32")


def init(key, modules=MODULES):
    return init_states(modules, OPTIMIZER, key, jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype))


@pytest.fixture(scope="module")
def states():
    return jax.jit(init)(jax.random.key(0))


def module_losses(params, states):
    """Returns the loss of each module in one local step of all, given the parameters of all."""
    x, losses = INPUTS, []
    for module, state, p in zip(MODULES, states, params, strict=True):
        _, x, metrics = local_step(module, OPTIMIZER, state.replace(params=p), x, TARGETS)
        losses.append(means(metrics)["loss"])
    return jnp.stack(losses)


def largest_gradients(states):
    """Returns a 3x3 table of the largest gradients.

    Entry (k, i) belongs to the loss of module k and the parameters of module i.
    """
    jacobian = jax.jit(jax.jacrev(module_losses))([s.params for s in states], states)
    return np.array(
        [
            [max(np.abs(leaf[k]).max() for leaf in jax.tree.leaves(entry)) for entry in jacobian]
            for k in range(3)
        ]
    )


@pytest.mark.medium
def test_no_gradient_reaches_another_module(states):
    table = largest_gradients(states)
    assert (table[~np.eye(3, dtype=bool)] == 0.0).all()
    assert (np.diag(table) > 1e-3).all()


@pytest.mark.medium
def test_twin_gradients_reach_lower_modules_without_stop_gradient(
    states, monkeypatch, fresh_traces
):
    monkeypatch.setattr(step, "lax", SimpleNamespace(stop_gradient=lambda x: x))
    table = largest_gradients(states)
    assert (table[np.tril_indices(3)] > 1e-4).all()
    # A loss does not depend on the modules above it in any case.
    assert (table[np.triu_indices(3, 1)] == 0.0).all()


def test_local_step_is_pure(states):
    local = partial(local_step, MODULES[0], OPTIMIZER)
    before = flat(jax.tree.map(np.array, states[0].replace(rng=None)))
    jitted = jax.jit(local)
    first, again = jitted(states[0], INPUTS, TARGETS), jitted(states[0], INPUTS, TARGETS)
    eager = local(states[0], INPUTS, TARGETS)
    np.testing.assert_array_equal(flat(states[0].replace(rng=None)), before)

    def values(result):
        return flat((result[0].replace(rng=None), *result[1:]))

    np.testing.assert_array_equal(values(first), values(again))
    np.testing.assert_allclose(values(eager), values(first), rtol=1e-6, atol=1e-6)
    changed = jitted(states[0], INPUTS + 0.1, TARGETS)
    assert not np.allclose(values(changed), values(first), rtol=1e-6, atol=1e-6)


def test_dropout_masks_depend_on_key_and_update_count_only():
    (module,) = make_modules([Block(64, dropout=0.5)], (0,), [Head()])
    (state,) = jax.jit(partial(init, modules=[module]))(jax.random.key(0))
    frozen = optax.sgd(0.0)
    state = state.replace(opt_state=frozen.init(state.params))
    local = jax.jit(partial(local_step, module, frozen))
    second, first_outputs, _ = local(state, INPUTS, TARGETS)
    third, second_outputs, _ = local(second, INPUTS, TARGETS)
    assert [int(s.updates) for s in (state, second, third)] == [0, 1, 2]
    assert (np.asarray(first_outputs == 0) != np.asarray(second_outputs == 0)).any()
    # A restored state, with the key of the first state, draws the same masks.
    again = local(
        second.replace(rng=jax.random.wrap_key_data(jax.random.key_data(state.rng))),
        INPUTS,
        TARGETS,
    )[1]
    np.testing.assert_array_equal(again, second_outputs)


def test_local_step_can_be_vmapped_over_seeds():
    keys = jax.random.split(jax.random.key(3), 2)
    local = partial(local_step, MODULES[0], OPTIMIZER)
    many = jax.jit(jax.vmap(lambda key: local(init(key)[0], INPUTS, TARGETS)[1:]))(keys)
    alone = jax.jit(lambda key: local(init(key)[0], INPUTS, TARGETS)[1:])
    for n in range(2):
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x, n=n: x[n], many)),
            flat(alone(keys[n])),
            rtol=1e-5,
            atol=1e-6,
        )
    assert not np.allclose(many[0][0], many[0][1])


def test_eval_step_without_objective_returns_no_predictions(states):
    headless = LocalModule("module_0", 0, MODULES[0].blocks, None)
    outputs, logits = eval_step(MODULES[0], states[0].params, states[0].batch_stats, INPUTS)
    bare, none = eval_step(headless, states[0].params, states[0].batch_stats, INPUTS)
    assert none is None
    assert logits.shape == (4, 3)
    np.testing.assert_array_equal(outputs, bare)


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_initial_values_do_not_depend_on_the_cut_or_the_heads(tiny, to_host):
    three, two = (to_host(spec.init()) for spec in (tiny.spec(3), tiny.spec(2, heads=False)))
    bodies = [
        {name: block for state in states for name, block in state.params["body"].items()}
        for states in (three, two)
    ]
    assert bodies[0].keys() == {"block_0", "block_1", "block_2"}
    assert same(bodies[1], bodies[0])
    assert same(two[-1].params["objective"], three[-1].params["objective"])
    assert not same(three[0].params["objective"], three[1].params["objective"])


def test_objective_without_blocks_can_be_initialized():
    (module,) = make_modules([], (0,), [Head()])
    params, _ = module.init(
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 3), "float32"),
        {"label": jax.ShapeDtypeStruct((2,), "int32")},
    )
    assert set(params) == {"body", "objective"}


# The shapes in the signatures are checked at run time.

checked = jaxtyped(typechecker=beartype)
WRONG = (BeartypeException, TypeCheckError)


def test_annotated_shapes_accept_valid_and_refuse_wrong_arguments(states):
    checked(local_step)(MODULES[0], OPTIMIZER, states[0], INPUTS, TARGETS)
    checked(eval_step)(MODULES[0], states[0].params, states[0].batch_stats, INPUTS)
    checked(classifier.cross_entropy)(jnp.zeros((4, 3)), TARGETS["label"])
    checked(classifier.accuracy)(jnp.zeros((4, 3), jnp.bfloat16), TARGETS["label"])
    for wrong in (
        lambda: checked(local_step)(MODULES[0], OPTIMIZER, states[0], INPUTS.astype(int), TARGETS),
        lambda: checked(local_step)(MODULES[0], OPTIMIZER, states[0], INPUTS, LABEL),
        lambda: checked(eval_step)(
            MODULES[0], states[0].params, states[0].batch_stats, INPUTS.astype(int)
        ),
        lambda: checked(classifier.cross_entropy)(jnp.zeros((4, 3)), TARGETS["label"][:3]),
        lambda: checked(classifier.cross_entropy)(jnp.zeros(4), TARGETS["label"]),
        lambda: checked(classifier.accuracy)(jnp.zeros((4, 3)), jnp.zeros(4)),
    ):
        with pytest.raises(WRONG):
            wrong()


def test_loss_and_accuracy_equal_values_by_hand():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    label = jnp.asarray([1, 2])
    np.testing.assert_allclose(
        classifier.cross_entropy(logits, label), -(np.log(0.25) + np.log(0.8)) / 2, rtol=1e-6
    )
    assert float(classifier.accuracy(logits, label)) == 0.5
    assert classifier.cross_entropy(logits.astype(jnp.bfloat16), label).dtype == jnp.float32


def test_smoothed_loss_and_its_gradient_equal_values_by_hand():
    # A smoothing of 0.3 gives each of three classes 0.1: the targets are 0.1, 0.8, 0.1.
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25]]))
    loss = classifier.cross_entropy(logits, jnp.asarray([1]), 0.3)
    np.testing.assert_allclose(
        loss, -(0.8 * np.log(0.25) + 0.1 * np.log(0.5) + 0.1 * np.log(0.25)), rtol=1e-6
    )
    assert (
        classifier.cross_entropy(logits.astype(jnp.bfloat16), jnp.asarray([1]), 0.3).dtype
        == jnp.float32
    )
    # The gradient is the probabilities minus the targets.
    gradient = jax.grad(classifier.cross_entropy)(logits, jnp.asarray([1]), 0.3)
    np.testing.assert_allclose(gradient, [[0.5 - 0.1, 0.25 - 0.8, 0.25 - 0.1]], rtol=1e-5)
