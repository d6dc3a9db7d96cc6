"""Batch normalisation, with the ReLU behind it if there is one, in as few passes over the maps as it can be done.

In training XLA's CPU compiler makes a pass over memory of nearly every operation that flax's layer and its gradient consist of, and
they were a third of a step of the six-layer CNN (benchmarks/cpu_reference). Written as one function with a gradient of its own
it is two sums and one pass forward, one pass, two sums and a pass back, and nothing is kept but the input.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

MOMENTUM = 0.9  # what the running averages keep at each batch
EPSILON = 1e-5  # added to the variance


class BatchNorm(nn.Module):
    """Over all axes but the last, as `flax.linen.BatchNorm` with the same names of parameters and statistics.

    Gradients are of first order, in reverse mode only.
    """

    dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *S C"], train: bool, *, relu: bool = False, offset: Float[Array, " C"] | None = None
    ) -> Float[Array, "B *S C"]:
        """Normalises x + offset, followed by a ReLU where asked to.

        Args:
          offset: the bias of the layer in front. In training it is not added, for the mean that is subtracted would hold it
            too: it moves the running mean, and its gradient is exactly 0.
        """
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        shift: Any = 0.0 if offset is None else offset
        if not train:
            y = _affine(x, mean.value - shift, lax.rsqrt(var.value + EPSILON), scale, bias)
            return (nn.relu(y) if relu else y).astype(self.dtype)
        y, of_batch, spread = normalize(x, scale, bias, relu)
        if not self.is_initializing():
            for running, new in ((mean, of_batch + shift), (var, spread)):
                running.value = MOMENTUM * running.value + (1 - MOMENTUM) * lax.stop_gradient(new)
        return y.astype(self.dtype)


def normalize(
    x: Float[Array, "B *S C"], scale: Float[Array, " C"], bias: Float[Array, " C"], relu: bool
) -> tuple[Float[Array, "B *S C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises by the batch's own mean and (biased) variance; worked out in float32, the result has the type of `x`.

    Returns:
      The result, the mean and the variance; no gradient goes through the last two.
    """
    return _normalize(relu, x, scale, bias)


def _forward(relu: bool, x: Array, scale: Array, bias: Array) -> tuple[tuple[Array, Array, Array], Any]:
    wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = wide.mean(axes)
    var = jnp.maximum(0.0, jnp.square(wide).mean(axes) - jnp.square(mean))  # rounding may leave less than 0
    inverse = lax.rsqrt(var + EPSILON)
    y = _affine(wide, mean, inverse, scale, bias)
    return ((nn.relu(y) if relu else y).astype(x.dtype), mean, var), (x, mean, inverse, scale, bias)


def _backward(relu: bool, saved: Any, cotangents: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, bias = saved
    wide, cotangent, axes = x.astype(jnp.float32), cotangents[0].astype(jnp.float32), tuple(range(x.ndim - 1))
    if relu:
        cotangent = jnp.where(_affine(wide, mean, inverse, scale, bias) > 0, cotangent, 0.0)
    count = x.size // x.shape[-1]
    of_bias = cotangent.sum(axes)
    of_scale = ((cotangent * wide).sum(axes) - mean * of_bias) * inverse
    # What moves all values alike moves the mean, and what spreads them the variance: neither shows in the result.
    slope = inverse * of_scale / count
    factor = inverse * scale
    of_x = factor * cotangent + (-factor * slope) * wide + factor * (mean * slope - of_bias / count)
    return of_x.astype(x.dtype), of_scale, of_bias


def _affine(x: Array, mean: Array, inverse: Array, scale: Array, bias: Array) -> Array:
    # Not x - mean first: the compiler would keep that for several uses, a map of its own, instead of computing it again.
    factor = inverse * scale
    return x * factor + (bias - mean * factor)


_normalize = jax.custom_vjp(lambda relu, *args: _forward(relu, *args)[0], nondiff_argnums=(0,))
_normalize.defvjp(_forward, _backward)
