"""VGG networks with batch norm (Simonyan and Zisserman 2015, configurations A, B, D and E)."""

from flax import linen as nn
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dgl_jax.models.blocks import KAIMING_FAN_OUT, ConvBlock, linear, linear_logits
from dgl_jax.models.network import Network
from dgl_jax.ops import max_pool_2x2

# Convolutions between two poolings, by depth. The depth also counts three linear layers.
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_MULTIPLES = (1, 2, 4, 8, 8)
_NORMAL = normal(0.01)


class VGGClassifier(nn.Module):
    """Classifier of 2x2 max pooling, 2 x (Linear to `hidden`, ReLU) and Linear.

    There is no dropout, as in the networks of the DGL paper.
    """

    num_classes: int
    hidden: int
    dtype: DTypeLike = "float32"
    ops: str = "auto"
    logits: str = "float32"

    pool = True  # for Network.halvings

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B classes"]:
        x = max_pool_2x2(x, ops=self.ops)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(linear(x, self.hidden, kernel_init=_NORMAL, dtype=self.dtype))
        return linear_logits(x, self.num_classes, self.dtype, self.logits, kernel_init=_NORMAL)


def vgg_bn(depth: int, width: int, num_classes: int, dtype: DTypeLike) -> Network:
    """Creates the network, with one block per convolution.

    A pooling layer belongs to the block after it, the last one to the classifier.

    Args:
      depth: 11, 13, 16 or 19.
      width: channels of the first block, 64 in the paper; the hidden layers of the classifier have
        64 x width units (4096 in the paper).
      num_classes: number of classes.
      dtype: dtype of the arithmetic.
    """
    blocks = tuple(
        ConvBlock(
            width * multiple, pool=stage > 0 and n == 0, kernel_init=KAIMING_FAN_OUT, dtype=dtype
        )
        for stage, (count, multiple) in enumerate(zip(_CONVOLUTIONS[depth], _MULTIPLES))
        for n in range(count)
    )
    return Network(blocks, VGGClassifier(num_classes, hidden=64 * width, dtype=dtype))
