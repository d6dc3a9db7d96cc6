"""Batch normalization with a fused ReLU, in as few passes over memory as possible.

XLA's CPU compiler turns nearly every operation of flax's layer and of its gradient into a separate
pass over memory; in training this took a third of a step of the six-layer CNN
(benchmarks/cpu_reference). As one function with a custom gradient, the forward pass is two sums and
one pass, the backward pass is one pass, two sums and one pass, and only the input is stored.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.ops.choice import only_xla

MOMENTUM = 0.9  # weight of the old running averages in an update
EPSILON = 1e-5  # added to the variance


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last.

    Parameters and statistics have the names of `flax.linen.BatchNorm`. Training normalizes with the
    mean and variance of the batch and moves the running averages (collection `batch_stats`) a tenth
    of the way to them; evaluation normalizes with the running averages.

    Attributes:
      dtype: dtype of the result; statistics are computed in float32.
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
        """Normalizes x + offset and applies a ReLU if `relu`.

        Args:
          x: features [B, C], maps [B, H, W, C] or tokens [B, T, C].
          train: normalize with the statistics of the batch and update the running averages.
          relu: apply a ReLU to the result.
          offset: bias [C] of the preceding layer, which must not have added it. In training it
            cancels when the mean is subtracted: it only shifts the running mean, and its gradient
            is exactly 0.

        Returns:
          The normalized values in `dtype`.
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
    """Normalizes by the mean and the (biased) variance of the batch, computed in float32.

    Args:
      x: features [B, C], maps [B, H, W, C] or tokens [B, T, C].
      scale: factor after the normalization, [C].
      bias: summand after the normalization, [C].
      relu: apply a ReLU to the result.
      ops: see `dgl_jax.ops`.

    Returns:
      The normalized values in the dtype of `x`, the mean and the variance. No gradient flows
      through the mean and the variance.
    """
    if only_xla(ops):
        y, mean, var = _forward(relu, False, x, scale, bias)[0]
        return y, lax.stop_gradient(mean), lax.stop_gradient(var)
    return _normalize(relu, ops == "joint", x, scale, bias)


def _forward(
    relu: bool, joint: bool, x: Array, scale: Array, bias: Array
) -> tuple[tuple[Array, Array, Array], Any]:
    wide, count = x.astype(jnp.float32), x.size // x.shape[-1]
    total, squares = _sums(joint, wide, jnp.square(wide))
    mean = total / count
    # Rounding may make the difference slightly negative.
    var = jnp.maximum(0.0, squares / count - jnp.square(mean))
    inverse = lax.rsqrt(var + EPSILON)
    y = _affine(wide, mean, inverse, scale, bias)
    return ((nn.relu(y) if relu else y).astype(x.dtype), mean, var), (x, mean, inverse, scale, bias)


def _backward(
    relu: bool, joint: bool, saved: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, bias = saved
    wide, cotangent = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    if relu:
        cotangent = jnp.where(_affine(wide, mean, inverse, scale, bias) > 0, cotangent, 0.0)
    count = x.size // x.shape[-1]
    bias_gradient, products = _sums(joint, cotangent, cotangent * wide)
    scale_gradient = (products - mean * bias_gradient) * inverse
    # The output is invariant to shift and scale of x, so that those components of the gradient are
    # projected out.
    slope = inverse * scale_gradient / count
    factor = inverse * scale
    x_gradient = (
        factor * cotangent
        + (-factor * slope) * wide
        + factor * (mean * slope - bias_gradient / count)
    )
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


def _sums(joint: bool, one: Array, other: Array) -> tuple[Array, Array]:
    """Sums two arrays over all axes but the last, in one reduction if `joint`.

    A GPU sums a map in two stages. XLA merges the first stages of separate sums, but not the second
    ones.
    """
    axes = tuple(range(one.ndim - 1))
    if not joint:
        return one.sum(axes), other.sum(axes)
    return lax.reduce(
        (one, other), (np.float32(0), np.float32(0)), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes
    )


def _affine(x: Array, mean: Array, inverse: Array, scale: Array, bias: Array) -> Array:
    # Do not compute x - mean first: the compiler would store that map for its several uses instead
    # of computing it again.
    factor = inverse * scale
    return x * factor + (bias - mean * factor)


_normalize = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(0, 1))
_normalize.defvjp(_forward, _backward)
