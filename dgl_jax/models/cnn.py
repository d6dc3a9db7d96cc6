"""CIFAR networks of the papers: plain convolutions, batch norm, ReLU and pooling."""

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.errors import UserError
from dgl_jax.models.blocks import ConvBlock, conv_norm
from dgl_jax.models.heads import LinearHead, MLPHead
from dgl_jax.models.network import Network
from dgl_jax.ops import avg_pool_windows, max_pool_windows

_SIDE = 3  # of the pooling windows of `cnn3`


class PooledBlock(nn.Module):
    """Block of a 5x5 convolution, batch norm, ReLU and pooling of 3x3 windows with stride 3.

    Attributes:
      features: output channels.
      average: pool by the average instead of the maximum.
      dtype: dtype of the arithmetic.
      ops: see `dgl_jax.ops`.
    """

    features: int
    average: bool = False
    dtype: DTypeLike = "float32"
    ops: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w F"]:
        """Computes maps of a third of the height and width, rounded down."""
        if min(x.shape[1:3]) < _SIDE:
            raise UserError(
                f"config.data.image_size: a block of config.model.name='cnn3' pools 3x3 windows of "
                f"a {x.shape[1]}x{x.shape[2]} map; images need at least 27x27 pixels"
            )
        x = conv_norm(x, train, self.features, relu=True, kernel=5, dtype=self.dtype, ops=self.ops)
        return (avg_pool_windows if self.average else max_pool_windows)(x, _SIDE, ops=self.ops)


def cnn3(width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates three blocks of a 5x5 convolution and 3x3 pooling: maximum, average, average.

    It is the network of the comparison with synthetic gradients, with width 128 (Jaderberg et al.
    2017, appendix C.1). Maps of 32x32 shrink to 10x10, 3x3 and 1x1; the classifier is linear.
    """
    blocks = tuple(PooledBlock(width, average=i > 0, dtype=dtype) for i in range(3))
    return Network(blocks, LinearHead(num_classes, dtype=dtype))


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
