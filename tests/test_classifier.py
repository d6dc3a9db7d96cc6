"""Cross entropy and metrics of examples with several labels, some of which are padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.objectives import classification
from dgl_jax.types import PADDING


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_padded_tokens_do_not_count(smoothing):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(2, 3, 4)), jnp.float32)
    label = jnp.asarray([[1, PADDING, 3], [PADDING, PADDING, 0]], jnp.int32)
    real = np.asarray(label) != PADDING

    def loss_of(logits, label):
        return classification(logits, label, smoothing).loss

    padded = classification(logits, label, smoothing)
    alone = classification(logits[real], label[real], smoothing)
    np.testing.assert_allclose(padded.loss, alone.loss, rtol=1e-6)
    for name, (total, count) in padded.metrics.items():
        assert count == 3
        np.testing.assert_allclose(total, alone.metrics[name][0], rtol=1e-6)
    gradient = np.asarray(jax.grad(loss_of)(logits, label))
    assert np.all(gradient[~real] == 0)
    np.testing.assert_allclose(
        gradient[real], jax.grad(loss_of)(logits[real], label[real]), rtol=1e-5
    )
    nothing = jnp.full_like(label, PADDING)
    assert float(loss_of(logits, nothing)) == 0
    assert np.all(np.asarray(jax.grad(loss_of)(logits, nothing)) == 0)


def test_twin_a_class_is_not_padding():
    logits = jnp.asarray([[[2.0, 0.0], [0.0, 0.0]]])
    counted = classification(logits, jnp.asarray([[0, 0]]))
    padded = classification(logits, jnp.asarray([[0, PADDING]]))
    assert abs(float(counted.loss - padded.loss)) > 0.1
