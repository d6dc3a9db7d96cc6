"""Distances of samples against NumPy, closed forms and hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.core import rngs
from dgl_jax.diagnostics import distance, drift, mmd, project, sliced_wasserstein, weighted_drift


def samples(count=50, directions=6):
    random = np.random.default_rng(0)
    one = random.normal(size=(count, directions)).astype(np.float32)
    return one, (one * 1.2 + 0.3 + 0.1 * random.normal(size=one.shape)).astype(np.float32)


def wasserstein_by_hand(x, y):
    gaps = [np.mean((np.sort(x[:, p]) - np.sort(y[:, p])) ** 2) for p in range(x.shape[1])]
    return np.sqrt(np.mean(gaps) / np.mean(y.var(axis=0)))


def mmd_by_hand(x, y):
    def mean(f, a, b):
        return np.mean([f(np.sum((u - v) ** 2)) for u in a for v in b])

    width = mean(lambda squared: squared, y, y)
    parts = [mean(lambda s: np.exp(-s / width), a, b) for a, b in ((x, x), (y, y), (x, y))]
    return np.sqrt(parts[0] + parts[1] - 2 * parts[2])


@pytest.mark.medium
@pytest.mark.parametrize(
    ("measure", "by_hand"), [(sliced_wasserstein, wasserstein_by_hand), (mmd, mmd_by_hand)]
)
def test_distances_and_errors_equal_numpy(measure, by_hand):
    x, y = (sample.astype(np.float64) for sample in samples(35))
    estimate = jax.jit(lambda a, b: distance(measure, a, b))(*samples(35))
    assert float(estimate.value) == pytest.approx(by_hand(x, y), rel=1e-4)
    # 16 groups of two examples: group g has the examples g and g + 16; the last three stay.
    left = [by_hand(*(np.delete(s, [g, g + 16], axis=0) for s in (x, y))) for g in range(16)]
    error = np.sqrt(15 / 16 * np.sum((np.array(left) - np.mean(left)) ** 2))
    assert float(estimate.error) == pytest.approx(error, rel=1e-2)
    swapped = float(measure(*samples(35)[::-1]))
    assert swapped != pytest.approx(float(estimate.value), rel=1e-3)  # the reference sets the scale


def test_projections_are_equal_in_64_bit_mode():
    x, key = samples()[0], rngs.root(0)
    usual = project(x, key, 5)
    with jax.enable_x64(True):
        wide = project(x, rngs.root(0), 5)
        values = drift(x, x + 1)
    assert wide.dtype == usual.dtype == jnp.float32
    np.testing.assert_array_equal(wide, usual)
    assert float(values["mmd"].value) == float(drift(x, x + 1)["mmd"].value) > 0


def test_equal_samples_have_distance_zero():
    for estimate in drift(samples()[0], samples()[0].copy()).values():
        assert float(estimate.value) == float(estimate.error) == 0
    assert all(float(estimate.value) > 0.1 for estimate in drift(*samples()).values())


def test_distances_of_normal_samples_equal_closed_forms():
    """Compares N(0, 1) and N(m, s^2), at the Wasserstein distance sqrt(m^2 + (1 - s)^2)."""
    random = np.random.default_rng(0)
    reference = random.normal(size=(1000, 1)).astype(np.float32)
    sample = (0.5 + 0.8 * random.normal(size=(1000, 1))).astype(np.float32)
    wasserstein, mmd = map(drift(sample, reference).__getitem__, ("wasserstein", "mmd"))
    expected = np.sqrt(0.5**2 + 0.2**2)
    assert abs(float(wasserstein.value) - expected) < 4 * float(wasserstein.error)

    def kernel(mean, variance):  # mean of exp(-z^2 / 2) for a normal z; the bandwidth is 2
        return np.exp(-(mean**2) / 2 / (1 + variance)) / np.sqrt(1 + variance)

    expected = np.sqrt(kernel(0, 2) + kernel(0, 1.28) - 2 * kernel(0.5, 1.64))
    assert abs(float(mmd.value) - expected) < 4 * float(mmd.error)
    assert 0 < float(mmd.error) < 0.1 * expected


def test_error_shrinks_with_the_number_of_examples():
    few, many = (float(drift(*samples(count))["mmd"].error) for count in (64, 4 * 64))
    assert 0.3 < many / few < 0.8


@pytest.mark.medium
@pytest.mark.parametrize("size", [3, 4096, 5000])
def test_projection_is_a_product_with_fixed_directions(size):
    key = rngs.directions(rngs.root(0), 1)
    x = np.random.default_rng(0).normal(size=(4, size)).astype(np.float32)
    projected = np.asarray(project(x.reshape(4, size, 1), key, 5), np.float64)
    eye = np.eye(size, dtype=np.float32)
    matrix = np.asarray(project(eye, key, 5), np.float64)
    np.testing.assert_allclose(projected, x.astype(np.float64) @ matrix, rtol=0, atol=1e-5)
    # Entries have variance 1 / size, and no two coordinates share them.
    if size > 3:
        assert np.mean(matrix**2) == pytest.approx(1 / size, rel=0.05)
    assert len(np.unique(matrix, axis=0)) == size
    other = project(x, rngs.directions(rngs.root(0), 2), 5)
    assert not np.allclose(other, projected)


def test_weighted_drift_by_hand():
    drifts = weighted_drift([0.25, 0.04, 0.01, 0.0], [2.0, 1.0, 1.0])
    assert drifts == pytest.approx([0.5, (1.0 + 0.2) / 3, (1.0 + 0.2 + 0.1) / 4])
    np.testing.assert_array_equal(weighted_drift([0.25, 0.04, 0.0], [0.0, 1.0]), [np.nan, 0.2])
    # In turn, the updates between two probes read the inputs of the later one.
    drifts = weighted_drift([0.25, 0.04, 0.0, 0.0], [2.0, 1.0, 1.0], in_turn=True)
    assert drifts == pytest.approx([0.2, 0.4 / 3, 0.1])


def test_distances_of_few_or_equal_examples_are_unknown():
    sample = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    few, enough = drift(sample[:2], sample[1:3]), drift(sample, sample[::-1])
    assert np.isfinite(few["mmd"].value)
    assert np.isnan(few["mmd"].error)
    assert np.isfinite(enough["mmd"].error)
    assert np.isnan(sliced_wasserstein(sample, jnp.ones((4, 3))))
