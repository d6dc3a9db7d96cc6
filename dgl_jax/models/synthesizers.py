"""Synthesizer of gradients: a small network from activations to the gradient with respect to them.

The architecture follows Jaderberg et al. 2017, appendix C. Synthesizers exist in training only, so
their hidden layers have no bias: batch norm would cancel it.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dgl_jax.errors import UserError
from dgl_jax.models.blocks import Conv, uniform_fan_in
from dgl_jax.ops import BatchNorm


class Synthesizer(nn.Module):
    """Prediction of B times the gradient of a mean loss with respect to activations.

    The layers are (layers - 1) x (convolution, batch norm, ReLU) and a convolution back to the
    channels of the activations. Features [B, C] and tokens [B, T, C] have linear layers in place of
    the convolutions, which apply to each token separately.

    The weights of the last layer are 0 at first, but its bias is not: the first predictions are
    small and equal for all examples.

    Attributes:
      channels: channels of the hidden layers; 0 for as many as the activations have.
      layers: number of layers.
      kernel: height and width of the kernels, an odd number.
      ops: see `dgl_jax.ops`.
    """

    channels: int = 0
    layers: int = 3
    kernel: int = 5
    ops: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ... C"], targets: Float[Array, "B ..."] | None, train: bool
    ) -> Float[Array, "B ... C"]:
        """Computes predictions of the shape of the activations, in float32.

        Args:
          x: activations; their dtype is the dtype of the arithmetic.
          targets: one row per example (or per token) that the prediction may depend on, such as a
            one-hot label; a linear layer of it is added in front of the first batch norm. None for
            none.
          train: see `BatchNorm`.

        Raises:
          UserError: there is no synthesizer for activations or targets of this shape.
        """
        if x.ndim not in (2, 3, 4):
            raise UserError(
                f"config.method.name: synthesizers take features (B, C), tokens (B, T, C) or maps "
                f"(B, H, W, C), not activations of shape {x.shape}"
            )
        outputs, dtype = x.shape[-1], x.dtype
        for number in range(self.layers):
            last = number == self.layers - 1
            x = self._layer(x, outputs if last else self.channels or outputs, last)
            if number == 0 and targets is not None:
                x += self._conditioned(targets, x)
            if not last:
                x = BatchNorm(dtype, self.ops)(x, train, relu=True)
        return x.astype(jnp.float32)

    def _layer(self, x: Array, features: int, last: bool) -> Array:
        """Applies a layer; the last one has a bias, and weights that are 0 at first."""
        fan_in = x.shape[-1] * (self.kernel**2 if x.ndim == 4 else 1)
        weights = nn.initializers.zeros if last else uniform_fan_in(fan_in)
        if x.ndim == 4:
            y = Conv(features, self.kernel, 1, False, weights, x.dtype, self.ops)(x)
        else:
            y = nn.Dense(features, use_bias=False, dtype=x.dtype, kernel_init=weights)(x)
        if not last:
            return y
        return y + self.param("bias", uniform_fan_in(fan_in), (features,)).astype(y.dtype)

    def _conditioned(self, targets: Array, x: Array) -> Array:
        """Returns a linear layer of the targets that can be added to activations x."""
        shape = (*targets.shape[:-1], *[1] * (x.ndim - targets.ndim))
        if any(size not in (1, limit) for size, limit in zip(shape, x.shape)):
            raise UserError(
                f"config.method.name=cdni: labels of shape {targets.shape[:-1]} do not fit "
                f"activations of shape {x.shape}; dni needs no labels"
            )
        weights = uniform_fan_in(targets.shape[-1])
        y = nn.Dense(
            x.shape[-1], use_bias=False, dtype=x.dtype, kernel_init=weights, name="targets"
        )(targets)
        return y.reshape(*shape, x.shape[-1])
