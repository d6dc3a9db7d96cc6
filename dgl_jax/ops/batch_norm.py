"""Batch normalisation, fused with the ReLU behind it, in as few passes over memory as it can be done.

In training XLA's CPU compiler makes a pass over memory of nearly every operation that flax's layer and its gradient consist of, and
they were a third of a step of the six-layer CNN (benchmarks/cpu_reference). Written as one function with a custom gradient it is
two sums and one pass forward, one pass, two sums and a pass back, and nothing is kept but the input.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.ops.choice import only_xla

MOMENTUM = 0.9  # share of the running averages that a batch leaves
EPSILON = 1e-5  # added to the variance


class BatchNorm(nn.Module):
    """Normalises over all axes but the last, as `flax.linen.BatchNorm` with the same names of parameters and statistics.

    In training the batch's mean and variance normalise, and the running averages (collection `batch_stats`) move a tenth of
    the way to them; in evaluation the running averages normalise.

    Attributes:
      dtype: of the result; statistics are computed in float32.
      ops: see `dgl_jax.ops`.
    """

    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *S C"],
        train: bool,
        *,
        relu: bool = False,
        offset: Float[Array, " C"] | None = None,
    ) -> Float[Array, "B *S C"]:
        """Normalises x + offset and applies a ReLU if `relu`.

        Args:
          x: features or maps.
          train: normalise with the batch's statistics and update the running averages.
          relu: apply a ReLU to the result.
          offset: bias of the layer in front, which must not have added it. In training it only moves the running mean, for the
            mean that is subtracted would contain it too; its gradient is exactly 0.

        Returns:
          The normalised values in `dtype`.
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
        y, batch_mean, batch_var = normalize(x, scale, bias, relu, self.ops)
        if not self.is_initializing():
            for running, new in ((mean, batch_mean + shift), (var, batch_var)):
                running.value = MOMENTUM * running.value + (1 - MOMENTUM) * lax.stop_gradient(new)
        return y.astype(self.dtype)


def normalize(
    x: Float[Array, "B *S C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    relu: bool,
    ops: str = "auto",
) -> tuple[Float[Array, "B *S C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises by the mean and the (biased) variance of the batch, computed in float32.

    Args:
      x: features or maps.
      scale, bias: applied after the normalisation.
      relu: apply a ReLU to the result.
      ops: see `dgl_jax.ops`.

    Returns:
      The normalised values in the type of `x`, the mean and the variance. No gradient flows through the last two.
    """
    if only_xla(ops):
        y, mean, var = _forward(relu, x, scale, bias)[0]
        return y, lax.stop_gradient(mean), lax.stop_gradient(var)
    return _normalize(relu, x, scale, bias)


def _forward(
    relu: bool, x: Array, scale: Array, bias: Array
) -> tuple[tuple[Array, Array, Array], Any]:
    wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = wide.mean(axes)
    var = jnp.maximum(
        0.0, jnp.square(wide).mean(axes) - jnp.square(mean)
    )  # rounding may leave less than 0
    inverse = lax.rsqrt(var + EPSILON)
    y = _affine(wide, mean, inverse, scale, bias)
    return ((nn.relu(y) if relu else y).astype(x.dtype), mean, var), (x, mean, inverse, scale, bias)


def _backward(
    relu: bool, saved: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, bias = saved
    wide, cotangent, axes = (
        x.astype(jnp.float32),
        cotangents[0].astype(jnp.float32),
        tuple(range(x.ndim - 1)),
    )
    if relu:
        cotangent = jnp.where(_affine(wide, mean, inverse, scale, bias) > 0, cotangent, 0.0)
    count = x.size // x.shape[-1]
    bias_gradient = cotangent.sum(axes)
    scale_gradient = ((cotangent * wide).sum(axes) - mean * bias_gradient) * inverse
    # A change that shifts all values alike moves the mean, one that spreads them the variance: neither shows in the result.
    slope = inverse * scale_gradient / count
    factor = inverse * scale
    x_gradient = (
        factor * cotangent
        + (-factor * slope) * wide
        + factor * (mean * slope - bias_gradient / count)
    )
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


def _affine(x: Array, mean: Array, inverse: Array, scale: Array, bias: Array) -> Array:
    # Not x - mean first: the compiler would store that map for its several uses instead of computing it again.
    factor = inverse * scale
    return x * factor + (bias - mean * factor)


_normalize = jax.custom_vjp(lambda relu, *args: _forward(relu, *args)[0], nondiff_argnums=(0,))
_normalize.defvjp(_forward, _backward)
