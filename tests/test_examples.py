"""Example of a user-defined network: a Vision Transformer in two modules learns the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgl_jax.core.module import init_states, make_modules
from dgl_jax.core.step import eval_step
from dgl_jax.errors import UserError
from dgl_jax.models import make_network
from dgl_jax.train import train_and_evaluate
from examples.vit import config as vit_config


def accuracy(engine, workdir, **train):
    """Trains the example; returns the test accuracy of the last module and all modules' devices."""
    config = vit_config.get_config()
    config.engine.name = engine
    config.engine.group_sizes = (1, 1)
    config.train.update(train)
    config.eval.every = config.checkpoint.every = 10_000  # only at the end of training
    modules = train_and_evaluate(config, workdir).modules
    return modules[-1]["test_accuracy"], [m["devices"] for m in modules]


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "devices"), [("fused", [[0, 1], [0, 1]]), ("pipeline", [[0], [1]])]
)
def test_transformer_learns_digits(engine, devices, tmp_path):
    last_accuracy, module_devices = accuracy(engine, tmp_path)
    assert last_accuracy >= 0.95
    assert module_devices == devices


@pytest.mark.slow
def test_twin_untrained_transformer_does_not_know_the_digits(tmp_path):
    assert accuracy("pipeline", tmp_path, steps=1)[0] < 0.5


def test_every_block_passes_tokens_and_every_head_returns_logits():
    network = make_network("vit", 8, 10, (8, 8, 1))
    modules = make_modules(network.blocks, range(5), [network.classifier] * 5)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), "float32")
    states = jax.eval_shape(
        lambda key: init_states(modules, optax.identity(), key, images), jax.random.key(0)
    )
    x = images
    for module, state in zip(modules, states):
        x, logits = jax.eval_shape(
            lambda s, x, m=module: eval_step(m, s.params, s.batch_stats, x), state, x
        )
        assert (x.shape, logits.shape) == ((2, 16, 8), (2, 10))  # 4x4 patches


def test_patches_are_ordered_row_by_row():
    """Checks which pixels each patch contains.

    With numbered pixels and all weights equal to one, a token is the sum of its patch's pixels.
    """
    embedding = make_network("vit", 4, 10, (4, 6, 1)).blocks[0]
    x = jnp.arange(24.0).reshape(1, 4, 6, 1)
    shapes = jax.eval_shape(lambda key: embedding.init(key, x, False), jax.random.key(0))
    ones = jax.tree.map(lambda leaf: jnp.full(leaf.shape, float(leaf.shape == (4, 4))), shapes)
    tokens = embedding.apply(ones, x, False)
    corners = [0, 2, 4, 12, 14, 16]
    assert tokens[0, :, 0].tolist() == [4 * first + 0 + 1 + 6 + 7 for first in corners]


@pytest.mark.parametrize(
    ("width", "size", "words"),
    [(30, 8, "config.model.width=30"), (32, 9, "config.data.image_size: images of 9x9")],
)
def test_invalid_width_and_image_size_are_refused(width, size, words):
    def trace():
        block = make_network("vit", width, 10, (size, size, 1)).blocks[0]
        jax.eval_shape(
            lambda x: block.init(jax.random.key(0), x, True),
            jax.ShapeDtypeStruct((2, size, size, 1), "float32"),
        )

    with pytest.raises(UserError, match=words):
        trace()


def test_attention_starts_with_orthogonal_matrices():
    network = make_network("vit", 8, 10, (8, 8, 1))
    modules = make_modules(network.blocks, [0], [network.classifier], gain=1.0)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), "float32")
    (state,) = init_states(modules, optax.identity(), jax.random.key(0), images)
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        *_, layer, name = (part.key for part in path)
        if name == "kernel":
            # Queries, keys and values have the axes (in, heads, dims), the others (..., out).
            inputs_first = layer in ("query", "key", "value")
            matrix = leaf.reshape((len(leaf), -1) if inputs_first else (-1, leaf.shape[-1]))
            np.testing.assert_allclose(np.linalg.svd(matrix)[1], 1.0, atol=1e-5, err_msg=layer)
            split += leaf.ndim == 3 and inputs_first
    assert split == 3 * 4  # in each of four blocks
