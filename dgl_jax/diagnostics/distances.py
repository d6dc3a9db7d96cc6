"""Distances between the distributions of two samples of a module's inputs.

Inputs may have millions of values per example. They are projected on random directions, and both
distances compare the projections.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dgl_jax.core import rngs

_CHUNK = 4096  # coordinates that are projected at once
_GROUPS = 16  # groups of the jackknife

Sample = Float[Array, "n p"]


class Distance(NamedTuple):
    """Distance between two samples, as device scalars.

    Attributes:
      value: the distance.
      error: its standard error from drawing the examples.
    """

    value: Float[Array, ""]
    error: Float[Array, ""]


def project(inputs: Float[Array, "n ..."], key: Key[Array, ""], directions: int) -> Sample:
    """Projects examples on random directions.

    The entries of a direction are independent normal numbers with variance 1 / d, for examples of d
    values. They are drawn again at every call, in parts, so that no large matrix is stored.

    Args:
      inputs: examples, [n, ...].
      key: equal keys draw equal directions.
      directions: number of directions p.

    Returns:
      The projections in float32, [n, p].
    """
    flat = inputs.reshape(inputs.shape[0], -1).astype(jnp.float32)
    size = flat.shape[1]
    width = min(size, _CHUNK)
    count = -(-size // width)
    parts = jnp.pad(flat, ((0, 0), (0, count * width - size))).reshape(-1, count, width)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        values, number = part
        drawn = jax.random.normal(rngs.part(key, number), (width, directions), jnp.float32)
        return total + jnp.matmul(values, drawn, precision=jax.lax.Precision.HIGHEST), None

    start = jnp.zeros((flat.shape[0], directions), jnp.float32)
    total, _ = jax.lax.scan(add, start, (parts.swapaxes(0, 1), jnp.arange(count)))
    return total / np.sqrt(size).astype(np.float32)


def sliced_wasserstein(sample: Sample, reference: Sample) -> Float[Array, ""]:
    """Computes the sliced 2-Wasserstein distance (Bonneel et al. 2015), relative to the spread.

    Args:
      sample: projections of n examples, [n, p].
      reference: projections of n other examples, or of the same ones at another time, [n, p].

    Returns:
      The distance in standard deviations of the reference: the root of the mean squared difference
      between sorted projections, over the root of the mean variance. NaN if all reference examples
      are equal.
    """
    gap = jnp.mean((jnp.sort(sample, axis=0) - jnp.sort(reference, axis=0)) ** 2)
    spread = _spread(reference)
    return jnp.where(spread > 0, jnp.sqrt(gap / jnp.where(spread > 0, spread, 1.0)), jnp.nan)


def mmd(sample: Sample, reference: Sample) -> Float[Array, ""]:
    """Computes the maximum mean discrepancy (Gretton et al. 2012) under a Gaussian kernel.

    The kernel is exp(-|a - b|^2 / h); h is the mean squared distance of two reference examples. The
    kernel is at most 1, so the discrepancy of two distributions is at most the integral of the
    absolute difference of their densities. This is the biased estimate, which is 0 for equal
    samples.

    Args:
      sample: projections of n examples, [n, p].
      reference: projections of n examples, [n, p].

    Returns:
      The discrepancy, from 0 to the root of 2.
    """
    center = reference.mean(axis=0)  # expanding squared distances needs small numbers
    tiny = jnp.finfo(jnp.float32).tiny
    bandwidth = jnp.maximum(2 * reference.shape[1] * _spread(reference), tiny)

    def kernel(a: Sample, b: Sample) -> Float[Array, ""]:
        product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        squared = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1) - 2 * product
        return jnp.mean(jnp.exp(-jnp.maximum(squared, 0.0) / bandwidth))

    a, b = sample - center, reference - center
    return jnp.sqrt(jnp.maximum(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b), 0.0))


def distance(
    measure: Callable[[Sample, Sample], Array], sample: Sample, reference: Sample
) -> Distance:
    """Computes a distance and its standard error by a jackknife over groups of examples.

    Row i of both samples belongs to the same example, so that a group leaves both at once. The
    error is the root of (G - 1) / G times the sum of squared deviations of the G values that leave
    out one group each (Shao and Tu 1995, section 2.3). The directions are the same throughout.

    Args:
      measure: `sliced_wasserstein` or `mmd`.
      sample: projections of n examples, [n, p].
      reference: projections of the same examples at another time, [n, p].

    Returns:
      The distance; its error is NaN with fewer than four examples.
    """
    count = sample.shape[0]
    groups = min(_GROUPS, count // 2)
    if groups < 2:
        return Distance(measure(sample, reference), jnp.full((), jnp.nan))
    members = np.arange(count // groups * groups).reshape(-1, groups)
    rest = np.stack([np.delete(np.arange(count), members[:, g]) for g in range(groups)])
    values = jax.lax.map(lambda rows: measure(sample[rows], reference[rows]), jnp.asarray(rest))
    spread = jnp.sum((values - values.mean()) ** 2)
    return Distance(measure(sample, reference), jnp.sqrt((groups - 1) / groups * spread))


@jax.jit
def drift(sample: Sample, reference: Sample) -> dict[str, Distance]:
    """Computes both distances with their errors, by name; see `distance`."""
    return {
        "wasserstein": distance(sliced_wasserstein, sample, reference),
        "mmd": distance(mmd, sample, reference),
    }


def weighted_drift(
    distances: Sequence[float], rates: Sequence[float], in_turn: bool = False
) -> list[float]:
    """Computes the drift sum of the convergence bound, at every probe after the first.

    Args:
      distances: distance c between the input distribution at each probe and the final one.
      rates: sum of the learning rates of the updates between each probe and the next one, one
        fewer than distances.
      in_turn: True if a module makes its updates after the module below has made all of its own.

    Returns:
      For each probe after the first, sum(eta sqrt(c)) / sum(eta) over the updates before it. The
      distance counts as constant from one probe to the next: as that of the earlier probe, or with
      `in_turn` of the later one, because the module below is settled before the updates begin. NaN
      while the rates are 0.
    """
    eta, roots = np.asarray(rates, np.float64), np.sqrt(np.asarray(distances, np.float64))
    weighted = np.cumsum(eta * (roots[1:] if in_turn else roots[:-1]))
    total = np.cumsum(eta)
    return np.divide(weighted, total, out=np.full_like(total, np.nan), where=total > 0).tolist()


def _spread(reference: Sample) -> Float[Array, ""]:
    """Returns the mean variance over the directions."""
    return jnp.mean(jnp.var(reference, axis=0))
