"""Heads: auxiliary classifiers from a module's activations to class logits.

They follow the papers' section on auxiliary networks. Heads take the number of channels C and the
size of the map from their input. Logits are always float32. Tokens [B, T, C] form no map that could
be reduced in steps; they are averaged over all T at once.
"""

from dataclasses import dataclass
from functools import partial

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.config.registry import HEADS, Kind
from dgl_jax.errors import UserError
from dgl_jax.models.blocks import Conv, conv_norm, linear, linear_logits
from dgl_jax.models.network import with_choices
from dgl_jax.ops import BatchNorm, adaptive_avg_pool


class MLPHead(nn.Module):
    """MLP head with staged reduction: MLP-aux, or MLP-SR-aux with `convs` = 3.

    With `hidden` = 2 it is also the final classifier of networks. The layers are:

        average to a quarter of the height and width (rounded up)
        convs  x (1x1 convolution, batch norm, ReLU)
        average to 2x2, flatten to 4C features
        hidden x (Linear 4C to 4C, batch norm, ReLU)
        Linear to the classes

    The first average of maps of 4x4 and smaller is to 2x2 (of a 1x1 map to 1x1): a quarter would be
    1x1, and the second average would then only copy one value four times.

    For tokens, the `convs` layers apply to each token separately, the only average is over all
    tokens, and the hidden layers map C to C features.

    Attributes:
      num_classes: number of classes.
      convs: number of 1x1 convolutions.
      hidden: number of hidden linear layers.
      dtype: dtype of the arithmetic.
      ops: see `dgl_jax.ops`.
      logits: the last layer computes in "float32", or in the dtype of the "model".
      pointwise: see `Conv`.
    """

    num_classes: int
    convs: int = 0
    hidden: int = 3
    dtype: DTypeLike = "float32"
    ops: str = "auto"
    logits: str = "float32"
    pointwise: str = "conv"

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"], train: bool) -> Float[Array, "B classes"]:
        x, tokens = _as_map(x)
        if not tokens:
            x = adaptive_avg_pool(x, (_reduced(x.shape[1]), _reduced(x.shape[2])), ops=self.ops)
        for _ in range(self.convs):
            x = conv_norm(
                x,
                train,
                x.shape[-1],
                relu=True,
                kernel=1,
                bias=False,
                dtype=self.dtype,
                ops=self.ops,
                pointwise=self.pointwise,
            )
        x = _flatten(
            adaptive_avg_pool(x, (1, 1), ops=self.ops) if tokens else _pool_2x2(x, self.ops)
        )
        for _ in range(self.hidden):
            x = linear(x, x.shape[-1], dtype=self.dtype)
            x = BatchNorm(self.dtype, self.ops)(x, train, relu=True)
        return linear_logits(x, self.num_classes, self.dtype, self.logits)


class CNNHead(nn.Module):
    """Convolutional head (CNN-aux), for maps only.

    The layers are 2 x (3x3 convolution, batch norm, ReLU) at full size, average to 2x2, batch norm
    and Linear.
    """

    num_classes: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"
    logits: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B classes"]:
        _require_map("cnn", x)
        for _ in range(2):
            x = conv_norm(
                x, train, x.shape[-1], relu=True, bias=False, dtype=self.dtype, ops=self.ops
            )
        x = BatchNorm(self.dtype, self.ops)(_pool_2x2(x, self.ops), train)
        return linear_logits(_flatten(x), self.num_classes, self.dtype, self.logits)


class Conv5x5Head(nn.Module):
    """Convolutional head of the comparison with synthetic gradients, for maps only.

    The layers are 2 x (5x5 convolution, batch norm, ReLU), a 5x5 convolution whose weights start at
    0, the average over the map and Linear. It has the layers of a synthesizer in the method `dni`.
    """

    num_classes: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"
    logits: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B classes"]:
        _require_map("conv5x5", x)
        features, dtype, ops = x.shape[-1], self.dtype, self.ops
        for _ in range(2):
            x = conv_norm(x, train, features, relu=True, kernel=5, dtype=dtype, ops=ops)
        x = Conv(features, 5, kernel_init=nn.initializers.zeros, dtype=dtype, ops=ops)(x)
        x = adaptive_avg_pool(x, (1, 1), ops=self.ops)[:, 0, 0]
        return linear_logits(x, self.num_classes, self.dtype, self.logits)


class LinearHead(nn.Module):
    """Smallest head: average over the map (or over all tokens) and Linear."""

    num_classes: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"
    logits: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"], train: bool) -> Float[Array, "B classes"]:
        x, _ = _as_map(x)
        x = adaptive_avg_pool(x, (1, 1), ops=self.ops)[:, 0, 0]
        return linear_logits(x, self.num_classes, self.dtype, self.logits)


@dataclass(frozen=True)
class HeadKind(Kind):
    """Registry entry of a head.

    `make(num_classes, dtype=dtype)` returns a Flax Linen module called as `head(x, train)` that
    returns logits.

    Attributes:
      pointwise: True if the head has 1x1 convolutions and a field of this name that chooses how
        they are computed, see `dgl_jax.models.blocks.Conv`.
    """

    pointwise: bool = False


HEADS.ship(
    mlp_sr=HeadKind(partial(MLPHead, convs=3), pointwise=True),
    mlp=HeadKind(MLPHead),
    cnn=HeadKind(CNNHead),
    conv5x5=HeadKind(Conv5x5Head),
    linear=HeadKind(LinearHead),
)


def make_head(
    name: str, num_classes: int, dtype: DTypeLike = "float32", ops: str = "auto"
) -> nn.Module:
    """Creates a registered head.

    Args:
      name: name of the head.
      num_classes: number of classes.
      dtype: dtype of the arithmetic; logits are float32.
      ops: formulation of the operations, see `dgl_jax.ops`.

    Returns:
      A linen module called as `head(x, train)` with maps [B, H, W, C] or tokens [B, T, C], which
      returns logits [B, num_classes].
    """
    return with_choices(HEADS[name].make(num_classes, dtype=dtype), ops=ops)


def _require_map(name: str, x: Array) -> None:
    if x.ndim != 4:
        raise UserError(
            f"config.model.head={name!r}: needs maps (B, H, W, C), not {_shape(x)}; "
            "for tokens use linear, mlp or mlp_sr"
        )


def _as_map(x: Array) -> tuple[Array, bool]:
    """Returns maps unchanged and tokens as [B, T, 1, C], and True if the input is tokens."""
    if x.ndim not in (3, 4):
        raise UserError(
            f"config.model.head: needs maps (B, H, W, C) or tokens (B, T, C), not {_shape(x)}"
        )
    return (x[:, :, None], True) if x.ndim == 3 else (x, False)


def _shape(x: Array) -> str:
    return f"features of shape (B, {', '.join(map(str, x.shape[1:]))})"


def _reduced(size: int) -> int:
    return max(-(-size // 4), min(2, size))


def _pool_2x2(x: Array, ops: str) -> Array:
    return adaptive_avg_pool(x, (min(2, x.shape[1]), min(2, x.shape[2])), ops=ops)


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)
