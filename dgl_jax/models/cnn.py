"""The papers' CIFAR networks: 3x3 convolutions whose width doubles at each 2x2 max pooling."""

from jax.typing import DTypeLike

from dgl_jax.models.blocks import ConvBlock
from dgl_jax.models.heads import MLPHead
from dgl_jax.models.network import Network


def cnn4(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Four blocks, pooling in front of the 2nd and 4th: the network of the learning curves (w = 64)."""
    return _network((1, 2, 2, 4), (1, 3), width, num_classes, dtype)


def cnn6(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Six blocks, pooling in front of the 2nd and 4th: the network of the study of auxiliary classifiers (w = 128)."""
    return _network((1, 2, 2, 4, 4, 4), (1, 3), width, num_classes, dtype)


def cnn6_replay(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Six blocks, pooling in front of the 3rd and 5th, no convolution bias: the asynchronous experiments' (w = 128).

    The classifier has three hidden layers, like the heads of the other modules.
    """
    return _network((1, 1, 2, 2, 4, 4), (2, 4), width, num_classes, dtype, bias=False, hidden=3)


def _network(
    multiples: tuple[int, ...],
    pooled: tuple[int, ...],
    width: int,
    num_classes: int,
    dtype: DTypeLike,
    *,
    bias: bool = True,
    hidden: int = 2,
) -> Network:
    blocks = tuple(
        ConvBlock(width * m, pool=i in pooled, bias=bias, dtype=dtype)
        for i, m in enumerate(multiples)
    )
    return Network(blocks, MLPHead(num_classes, hidden=hidden, dtype=dtype))
