"""CIFAR networks of the papers: 3x3 convolutions whose width doubles at each 2x2 max pooling."""

from jax.typing import DTypeLike

from dgl_jax.models.blocks import ConvBlock
from dgl_jax.models.heads import MLPHead
from dgl_jax.models.network import Network


def cnn4(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates four blocks with pooling before the 2nd and 4th.

    It is the network of the learning curves in the paper, with width 64.
    """
    return _network((1, 2, 2, 4), (1, 3), width, num_classes, dtype)


def cnn6(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates six blocks with pooling before the 2nd and 4th.

    It is the network of the paper's study of auxiliary classifiers, with width 128.
    """
    return _network((1, 2, 2, 4, 4, 4), (1, 3), width, num_classes, dtype)


def cnn6_replay(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates six blocks without convolution bias, with pooling before the 3rd and 5th.

    It is the network of the asynchronous experiments, with width 128. The classifier has three
    hidden layers, like the heads of the other modules.
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
