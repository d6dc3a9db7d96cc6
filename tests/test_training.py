"""Rematerialization and micro-batches: the same numbers with less memory."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import small_config

from dgl_jax import system
from dgl_jax.config import make_settings
from dgl_jax.core import apply, step
from dgl_jax.core.module import init_states, make_modules
from dgl_jax.core.step import forward_step, local_step
from dgl_jax.engines.placement import check_batch, one_group
from dgl_jax.errors import UserError
from dgl_jax.ops import remat
from dgl_jax.run.build import make_experiment

BATCH = 8
OPTIMIZER = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
TARGETS = {"label": jnp.arange(BATCH) % 3}


class Dense(nn.Module):
    """Block without batch norm whose output is one token of 16 channels; compiles quickly."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), 1, -1)))
        return nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x


class Normal(nn.Module):
    """Block with a batch norm and nothing else."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class Wide(nn.Module):
    """Block whose hidden activations are larger than its output."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(16)(nn.relu(nn.Dense(256)(x)))


class Logits(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(x.reshape(len(x), -1))


@cache
def one_module(*blocks, shape=(5,), remat=False):
    """Returns a module of these blocks, its state and inputs, all drawn by NumPy."""
    (module,) = make_modules(blocks, (0,), [Logits()], remat)
    random = np.random.default_rng(0)
    inputs = jax.ShapeDtypeStruct((BATCH, *shape), "float32")
    (state,) = jax.eval_shape(
        lambda key: init_states([module], OPTIMIZER, key, inputs), jax.random.key(0)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.opt_state)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), state.params
    )
    stats = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, float("var" in str(path))), state.batch_stats
    )
    state = state.replace(
        params=params,
        batch_stats=stats,
        opt_state=zeros,
        updates=jnp.int32(0),
        rng=jax.random.key(0),
    )
    return module, state, jnp.asarray(random.normal(size=inputs.shape), "float32")


def updated(module, state, inputs, **options):
    """Returns state, outputs and metrics of one update, as host arrays."""
    new, outputs, metrics = jax.jit(partial(local_step, module, OPTIMIZER, **options))(
        state, inputs, TARGETS
    )
    return jax.tree.map(np.asarray, (new.replace(rng=None), outputs, metrics))


@cache
def plain(*blocks):
    """Returns the result of one update without rematerialization and micro-batches."""
    return updated(*one_module(*blocks))


def largest_error(a, b):
    """Returns the largest |a - b| over a pytree, relative to the largest |b| of each array."""
    distances = jax.tree.map(
        lambda x, y: np.max(np.abs(np.float64(x) - y)) / max(np.max(np.abs(y)), 1e-3), a, b
    )
    return max(jax.tree.leaves(distances))


def temporary(remat=False, **options):
    """Returns the temporary memory in bytes that XLA plans for one update of wide blocks."""
    module, state, inputs = one_module(*[Wide()] * 4, shape=(64, 16), remat=remat)
    lowered = jax.jit(partial(local_step, module, OPTIMIZER, **options)).lower(
        state, inputs, TARGETS
    )
    return system.program_plan(lowered.compile()).temporary


@pytest.fixture(scope="module")
def plain_temporary():
    """Returns the temporary memory of the plain update."""
    return temporary()


# Rematerialization

MIXED = (Dense(), Normal(), Dense(0.5), Normal())


@pytest.mark.slow
def test_remat_changes_no_number():
    assert largest_error(updated(*one_module(*MIXED, remat=True)), plain(*MIXED)) < 1e-6


@pytest.mark.medium
def test_twin_remat_with_other_parameters_is_noticed(monkeypatch):
    monkeypatch.setattr(remat, "after", lambda tree, first: jax.tree.map(lambda x: 1.01 * x, tree))
    broken = updated(*one_module(*MIXED, remat=True))
    assert largest_error(broken[1:], plain(*MIXED)[1:]) < 1e-6  # the forward pass is the same
    assert largest_error(broken, plain(*MIXED)) > 1e-3


@pytest.mark.medium
@pytest.mark.full_compile
def test_remat_takes_less_memory(plain_temporary):
    assert temporary(remat=True) < 0.7 * plain_temporary


@pytest.mark.full_compile
def test_twin_without_remat_no_memory_is_saved(plain_temporary, monkeypatch):
    monkeypatch.setattr(apply, "recomputed", lambda function, ops: function)
    assert temporary(remat=True) > 0.7 * plain_temporary


# Micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_without_batch_norm_equal_the_whole_batch(parts):
    assert (
        largest_error(
            updated(*one_module(Dense(), Dense()), accumulate=parts), plain(Dense(), Dense())
        )
        < 1e-6
    )


@pytest.mark.parametrize("broken", ["one part twice", "wrong order", "sum, not mean"])
def test_twin_broken_micro_batches_are_noticed(monkeypatch, broken):
    split = step._split
    if broken == "one part twice":
        monkeypatch.setattr(step, "_split", lambda tree, parts: split(tree, parts)[:1] * parts)
    elif broken == "wrong order":
        monkeypatch.setattr(step, "_join", jnp.concatenate)
    else:
        gradient = step.apply_gradient
        monkeypatch.setattr(
            step,
            "apply_gradient",
            lambda o, s, g, b: gradient(o, s, jax.tree.map(lambda x: 2 * x, g), b),
        )
    assert (
        largest_error(updated(*one_module(Dense(), Dense()), accumulate=2), plain(Dense(), Dense()))
        > 1e-3
    )


def test_batch_norm_normalizes_each_micro_batch_separately():
    module, state, inputs = one_module(Normal())
    new, outputs, _ = updated(module, state, inputs, accumulate=2)
    x, params = np.float64(inputs), state.params["body"]["block_0"]["BatchNorm_0"]
    expected, mean, var = np.empty_like(x), np.zeros(5), np.ones(5)
    # Micro-batches take every second example: first the even ones, then the odd ones.
    for part in (slice(0, None, 2), slice(1, None, 2)):
        m, v = x[part].mean(0), x[part].var(0)
        expected[part] = (x[part] - m) / np.sqrt(v + 1e-5) * params["scale"] + params["bias"]
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v
    stats = new.batch_stats["body"]["block_0"]["BatchNorm_0"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    # The statistics of the whole batch are different.
    assert not np.allclose(plain(Normal())[1], expected, rtol=1e-3)


def test_micro_batches_draw_different_dropout_masks():
    module, state, inputs = one_module(Dense(0.5))
    outputs = updated(module, state, jnp.ones_like(inputs), accumulate=2)[1] == 0
    assert (outputs[0::2] != outputs[1::2]).any()


@pytest.mark.medium
def test_forward_step_in_train_mode_equals_the_outputs_of_an_update():
    module, state, inputs = one_module(Normal(), Dense(0.5))
    whole, halves = (
        jax.jit(partial(forward_step, module, train=True, accumulate=n))(state, inputs)[0]
        for n in (1, 2)
    )
    np.testing.assert_allclose(
        halves, updated(module, state, inputs, accumulate=2)[1], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(whole, plain(Normal(), Dense(0.5))[1], rtol=1e-6, atol=1e-6)
    assert not np.allclose(whole, halves, rtol=1e-3)


@pytest.mark.medium
@pytest.mark.full_compile
def test_micro_batches_take_less_memory(plain_temporary):
    assert temporary(accumulate=4) < 0.5 * plain_temporary


def nonfinite_outputs():
    """Returns True per micro-batch with nonfinite outputs, after nonfinite inputs of the first."""
    module, state, inputs = one_module(Dense(), Dense())
    outputs = updated(module, state, inputs.at[::2].set(jnp.nan), accumulate=2)[1]
    return [not np.isfinite(outputs[part::2]).all() for part in range(2)]


def test_micro_batch_waits_for_the_gradient_of_the_previous_one():
    # The order is enforced by adding 0 times the previous gradient to the parameters, the only
    # dependence that XLA's CPU compiler does not remove. NaN therefore reaches the second outputs.
    assert nonfinite_outputs() == [True, True]


def test_twin_without_enforced_order_a_micro_batch_does_not_wait(monkeypatch):
    monkeypatch.setattr(step, "after", lambda tree, first: tree)
    assert nonfinite_outputs() == [True, False]


def exchanged(devices, monkeypatch=None):
    """Returns True if two devices exchange examples during an update in two micro-batches."""
    module, state, inputs = one_module(Dense(), Dense())
    group = one_group(devices[:2], 1)
    assert group.split(0) == NamedSharding(group.groups[0], PartitionSpec("batch"))
    everywhere, split = group.replicated(0), group.split(0)
    jitted = jax.jit(
        partial(local_step, module, OPTIMIZER, accumulate=2),
        in_shardings=(everywhere, split, split),
    )
    text = jitted.lower(state, inputs, TARGETS).compile().as_text()
    assert "all-reduce" in text  # of the gradients
    return any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_devices_exchange_no_examples_for_micro_batches(devices):
    assert not exchanged(devices)


def test_twin_contiguous_micro_batches_are_exchanged(devices, monkeypatch):
    def halves(tree, parts):
        return [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], tree) for i in range(parts)]

    monkeypatch.setattr(step, "_split", halves)
    monkeypatch.setattr(step, "_join", jnp.concatenate)
    assert exchanged(devices)


@pytest.mark.parametrize(
    ("engine", "sizes", "parts", "works"),
    [
        (
            "fused",
            (),
            3,
            "the 2 images per device of module_0 into micro-batches of at least 2 images; "
            "1, 2 would do",
        ),
        (
            "pipeline",
            (1, 2),
            8,
            "the 8 images per device of module_0 into micro-batches of at least 2 images; "
            "1, 2, 4 would do",
        ),
        ("pipeline", (2, 1), 8, "the 4 images per device of module_0"),
        ("simulated", (), 5, "the 8 images per device of module_0"),
        ("backprop", (), 8, "1, 2 would do"),
    ],
)
def test_micro_batches_must_divide_the_batch_of_a_device(engine, sizes, parts, works):
    fields = {"engine__name": engine, "engine__group_sizes": sizes, "train__accumulate": parts}
    with pytest.raises(
        UserError, match=rf"config\.train\.accumulate={parts}: must divide .*"
    ) as error:
        make_experiment(make_settings(small_config(**fields)))
    assert works in str(error.value)
    assert "\n" not in str(error.value)


def test_micro_batches_that_divide_the_batch_are_accepted(devices):
    check_batch(8, one_group(devices, 1).sizes(), 2)
    check_batch(8, one_group(devices[:1], 1).sizes(), 4)
