"""Gradients of local losses, in float64, equal finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from test_objectives import LABEL, Given, inputs, make

from dgl_jax.models import ContextInput
from dgl_jax.objectives import Classifier, InfoPro, Transport, cross_entropy, info_pro, pred_sim


def assert_gradient(term, x):
    """Compares the gradient of a scalar function of a float64 array with finite differences."""
    term, step = jax.jit(term), 1e-5
    gradient = jax.grad(term)(x)
    assert gradient.dtype == np.float64
    directions = step * np.eye(x.size).reshape(-1, *x.shape)
    # Weights of the central difference whose error is of fourth order.
    weights = {1: 2 / 3, 2: -1 / 12}
    numeric = [
        sum(w * (term(x + n * d) - term(x - n * d)) for n, w in weights.items()) / step
        for d in directions
    ]
    np.testing.assert_allclose(gradient, np.reshape(numeric, x.shape), rtol=1e-6, atol=1e-9)


@pytest.fixture
def in_float64(monkeypatch):
    # Logits, residuals and batch statistics are rounded to float32 in training.
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "term",
    [
        lambda x: pred_sim.similarity_loss(pred_sim.deviation(x), LABEL, 2),
        lambda x: info_pro.contrastive_loss(x[:, 0], np.array([0, 1, 1]), 0.5),
        lambda x: info_pro.reconstruction_error(
            x[..., None], jnp.cos(x[..., None]), (0.4,), (0.3,)
        ),
        lambda x: cross_entropy(x[:, 0], LABEL, 0.2),
        lambda x: (
            Transport(Classifier(Given()), 0.7)
            .apply(
                {}, x, {"label": LABEL}, {"intermediates": {"b": {"residual": (x,)}}}, train=True
            )
            .loss
        ),
    ],
    ids=["similarity", "contrast", "reconstruction", "smoothing", "transport"],
)
def test_gradients_equal_finite_differences(term, in_float64):
    assert_gradient(term, np.random.default_rng(0).normal(size=(3, 4, 2)))


def assert_gradient_of_module(module, x, *arguments, loss):
    """Compares gradients for inputs and all parameters, in training, with finite differences."""
    variables = module.init(jax.random.key(0), x, *arguments, train=False)
    flat, unravel = ravel_pytree((jnp.asarray(x), variables.pop("params", {})))
    assert flat.dtype == np.float64

    def term(flat):
        features, params = unravel(flat)
        result, _ = module.apply(
            {"params": params} | variables, features, *arguments, train=True, mutable="batch_stats"
        )
        return loss(result)

    # Other parameters than the initial ones: biases of 0 and scales of 1 hide terms.
    assert_gradient(term, np.asarray(flat) + 0.1 * np.random.default_rng(1).normal(size=flat.size))


@pytest.mark.medium
@pytest.mark.parametrize("momentum_block", [False, True])
def test_gradients_of_auxiliary_networks_equal_finite_differences(momentum_block, in_float64):
    at = inputs(1, width=2, dtype="float64", label_smoothing=0.1)
    objective = make("auglocal", at, depth=2, momentum_block=momentum_block)
    objective = objective.clone(head=Given())
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2))
    published = {}
    if momentum_block:
        block = objective.momentum
        published = {"next_block": block.init(jax.random.key(5), x, train=False)}
    assert_gradient_of_module(
        objective, x, {"label": LABEL}, published, loss=lambda result: result.loss
    )


@pytest.mark.medium
def test_gradients_of_context_input_equal_finite_differences(in_float64):
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 1))
    image = {"image": np.random.default_rng(2).normal(size=(3, 4, 4, 1))}
    assert_gradient_of_module(
        ContextInput("float64"), x, image, loss=lambda y: jnp.sum(jnp.cos(y) * (1 + x))
    )


@pytest.mark.medium
@pytest.mark.parametrize(("kernel", "pool"), [(3, 1), (3, 2), (0, 1)])
def test_gradients_of_similarity_matching_equal_finite_differences(kernel, pool, in_float64):
    objective = pred_sim.PredSim(Given(), 2, 0.3, kernel, pool, 0.1, "float64", "xla")
    x = np.random.default_rng(0).normal(size=(3, 4, 2, 2))
    assert_gradient_of_module(objective, x, {"label": LABEL}, {}, loss=lambda result: result.loss)


@pytest.mark.medium
@pytest.mark.parametrize("contrast", [False, True])
def test_gradients_of_reconstruction_equal_finite_differences(contrast, in_float64):
    about = {"mean": (0.4,), "std": (0.3,), "dtype": "float64", "ops": "xla"}
    objective = InfoPro(Given(), 0.7, 0.5, contrast, 0.5, **about)
    random = np.random.default_rng(0)
    context = {"label": LABEL, "image": random.normal(size=(3, 3, 4, 1))}
    assert_gradient_of_module(
        objective,
        random.normal(size=(3, 1, 2, 2)),
        *(context, {}),
        loss=lambda result: result.loss,
    )
