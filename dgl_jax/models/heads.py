"""Auxiliary classifiers: from a module's output to class logits (the papers' section on auxiliary networks).

Heads read the number of channels C and the map's size from their input. Logits are float32 whatever the arithmetic.
Tokens (B, T, C) have no map that could be reduced to a smaller one: their one average is over all T.
"""

from dataclasses import dataclass
from functools import partial

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.errors import UserError
from dgl_jax.models.blocks import conv_norm, linear
from dgl_jax.models.network import with_ops
from dgl_jax.ops import BatchNorm, adaptive_avg_pool
from dgl_jax.registry import HEADS, Kind


class MLPHead(nn.Module):
    """MLP-aux, or MLP-SR-aux with `convs` = 3, or with `hidden` = 2 the classifier that ends a network.

    Staged reduction: average to a quarter of the size (rounded up), `convs` x (1x1 convolution, batch norm, ReLU),
    average to 2x2, flatten to 4C, `hidden` x (Linear 4C to 4C, batch norm, ReLU), Linear.

    Maps of 4x4 and smaller are averaged to 2x2 at once, where a quarter would be 1x1 and its four copies; 1x1 stays.

    Of tokens, each passes the `convs` (a Linear layer each) by itself, the average is over all, the hidden layers are C to C.
    """

    num_classes: int
    convs: int = 0
    hidden: int = 3
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"], train: bool) -> Float[Array, "B classes"]:
        x, tokens = _as_map(x)
        if not tokens:
            x = adaptive_avg_pool(x, (_staged(x.shape[1]), _staged(x.shape[2])), ops=self.ops)
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
            )
        x = _flatten(
            adaptive_avg_pool(x, (1, 1), ops=self.ops) if tokens else _pool_2x2(x, self.ops)
        )
        for _ in range(self.hidden):
            x = linear(x, x.shape[-1], dtype=self.dtype)
            x = BatchNorm(self.dtype, self.ops)(x, train, relu=True)
        return linear(x, self.num_classes, dtype="float32")


class CNNHead(nn.Module):
    """CNN-aux: 2 x (3x3 convolution, batch norm, ReLU) at full size, average to 2x2, batch norm, Linear. Of maps only."""

    num_classes: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B classes"]:
        if x.ndim != 4:
            raise UserError(
                f"config.model.head='cnn': needs maps (B, H, W, C), not {_shape(x)}; of tokens linear, mlp and mlp_sr work"
            )
        for _ in range(2):
            x = conv_norm(
                x, train, x.shape[-1], relu=True, bias=False, dtype=self.dtype, ops=self.ops
            )
        x = BatchNorm(self.dtype, self.ops)(_pool_2x2(x, self.ops), train)
        return linear(_flatten(x), self.num_classes, dtype="float32")


class LinearHead(nn.Module):
    """Applies an average over the map, or over all tokens, and Linear: the smallest head."""

    num_classes: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"], train: bool) -> Float[Array, "B classes"]:
        x, _ = _as_map(x)
        return linear(
            adaptive_avg_pool(x, (1, 1), ops=self.ops)[:, 0, 0], self.num_classes, dtype="float32"
        )


@dataclass(frozen=True)
class HeadKind(Kind):
    """A head: `make(num_classes, dtype=dtype)` returns a Flax Linen module called as `head(x, train)` that gives logits."""


HEADS.ship(
    mlp_sr=HeadKind(partial(MLPHead, convs=3)),
    mlp=HeadKind(MLPHead),
    cnn=HeadKind(CNNHead),
    linear=HeadKind(LinearHead),
)


def make_head(
    name: str, num_classes: int, dtype: DTypeLike = "float32", ops: str = "auto"
) -> nn.Module:
    """Makes the head of that name.

    Args:
      name: a registered one.
      num_classes: classes it tells apart.
      dtype: of the arithmetic; logits are float32.
      ops: see `make_network`.

    Returns:
      A linen module called as `head(x, train)` with a map (B, H, W, C) or tokens (B, T, C), which gives (B, num_classes).
    """
    return with_ops(HEADS[name].make(num_classes, dtype=dtype), ops)


def _as_map(x: Array) -> tuple[Array, bool]:
    """Returns maps as they are and tokens as (B, T, 1, C); and whether they are tokens."""
    if x.ndim not in (3, 4):
        raise UserError(
            f"config.model.head: needs maps (B, H, W, C) or tokens (B, T, C), not {_shape(x)}"
        )
    return (x[:, :, None], True) if x.ndim == 3 else (x, False)


def _shape(x: Array) -> str:
    return f"features of shape (B, {', '.join(map(str, x.shape[1:]))})"


def _staged(size: int) -> int:
    return max(-(-size // 4), min(2, size))


def _pool_2x2(x: Array, ops: str) -> Array:
    return adaptive_avg_pool(x, (min(2, x.shape[1]), min(2, x.shape[2])), ops=ops)


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)
