"""Networks, heads and where to cut: flax modules that know nothing of training."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax.typing import DTypeLike

from dgl_jax.errors import UserError
from dgl_jax.models.cnn import cnn4, cnn6, cnn6_replay
from dgl_jax.models.heads import HEADS, make_head
from dgl_jax.models.network import Network
from dgl_jax.models.partition import BALANCED, BlockCosts, cuts
from dgl_jax.models.resnet import cifar_resnet, imagenet_resnet, resnet18_cifar
from dgl_jax.models.vgg import vgg_bn

__all__ = ["BALANCED", "HEADS", "MODELS", "BlockCosts", "Network", "cuts", "make_head", "make_network"]

MODELS: dict[str, Callable[[int, int, DTypeLike], Network]] = {
    "cnn4": cnn4,
    "cnn6": cnn6,
    "cnn6_replay": cnn6_replay,
    **{f"vgg{depth}": partial(vgg_bn, depth) for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": partial(imagenet_resnet, depth) for depth in (18, 34, 50, 101, 152)},
    "resnet18_cifar": resnet18_cifar,
}


def make_network(
    name: str, width: int, num_classes: int, image_shape: tuple[int, int, int], dtype: DTypeLike = "float32"
) -> Network:
    """The network of that name.

    Args:
      name: a key of `MODELS`.
      width: channels of the first block.
      num_classes: classes the classifier tells apart.
      image_shape: height, width and channels of the images it is for.
      dtype: of the arithmetic; parameters and batch statistics stay float32, logits are float32.

    Raises:
      UserError: the images cannot be halved as often as the network pools.
    """
    network = MODELS[name](width, num_classes, jnp.dtype(dtype))
    step = 2**network.halvings
    height, across, _ = image_shape
    if height % step or across % step or not height or not across:
        near = {size // step * step for size in (height, height + step - 1, across, across + step - 1)} - {0}
        raise UserError(
            f"config.data.image_size: images of {height}x{across} cannot be halved {network.halvings} times, as "
            f"config.model.name={name!r} does; multiples of {step} work, such as {' or '.join(map(str, sorted(near)))}"
        )
    return network
