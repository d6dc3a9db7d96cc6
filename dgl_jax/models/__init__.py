"""Networks, heads and where to cut: flax modules that know nothing of training."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dgl_jax.errors import UserError
from dgl_jax.models.adapters import Adapter, AdapterKind
from dgl_jax.models.cnn import cnn4, cnn6, cnn6_replay
from dgl_jax.models.heads import HeadKind, make_head
from dgl_jax.models.network import Network, with_ops
from dgl_jax.models.partition import BALANCED, BlockCosts, cuts
from dgl_jax.models.resnet import cifar_resnet, imagenet_resnet, resnet18_cifar
from dgl_jax.models.vgg import vgg_bn
from dgl_jax.registry import ADAPTERS, HEADS, NETWORKS, Kind

__all__ = [
    "ADAPTERS",
    "BALANCED",
    "HEADS",
    "NETWORKS",
    "Adapter",
    "AdapterKind",
    "BlockCosts",
    "HeadKind",
    "Network",
    "NetworkKind",
    "cuts",
    "make_head",
    "make_network",
    "register_adapter",
    "register_head",
    "register_network",
]


@dataclass(frozen=True)
class NetworkKind(Kind):
    """A network: `make(width, num_classes, dtype)` returns a `Network`, or the list of its blocks.

    Behind a list, the `linear` head is the classifier. Blocks are Flax Linen modules called as `block(x, train)`, from images
    (B, H, W, C), or other inputs that a task makes, to features that the heads take, (B, H, W, C) or (B, T, C). The network may be
    cut between any two of them. A field `ops` of a block is set to `config.model.ops`, for the layers of this package in it.
    """


NETWORKS.ship(
    cnn4=NetworkKind(cnn4),
    cnn6=NetworkKind(cnn6),
    cnn6_replay=NetworkKind(cnn6_replay),
    **{f"vgg{depth}": NetworkKind(partial(vgg_bn, depth)) for depth in (11, 13, 16, 19)},
    **{
        f"resnet{depth}": NetworkKind(partial(cifar_resnet, depth))
        for depth in (20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}": NetworkKind(partial(imagenet_resnet, depth))
        for depth in (18, 34, 50, 101, 152)
    },
    resnet18_cifar=NetworkKind(resnet18_cifar),
)
register_head = HEADS.register
register_adapter = ADAPTERS.register


def register_network(
    name: str, make: Callable[[int, int, DTypeLike], Network | Sequence[nn.Module]] | NetworkKind
) -> None:
    """Adds a network: from here on `config.model.name=<name>` selects it.

    A run reads its network by this name whenever it is resumed, evaluated, used or exported: name the module that registers it in
    `config.plugins`.

    Args:
      make: the factory, or a kind with options of its own; see `NetworkKind`.

    Raises:
      UserError: the package has a network of this name.
    """
    NETWORKS.register(name, make if isinstance(make, NetworkKind) else NetworkKind(make))


def make_network(
    name: str,
    width: int,
    num_classes: int,
    input_shape: tuple[int, ...],
    dtype: DTypeLike = "float32",
    ops: str = "auto",
) -> Network:
    """Makes the network of that name.

    Args:
      name: a registered one.
      width: channels of the first block.
      num_classes: classes the classifier tells apart.
      input_shape: of an example, as the network reads it; of images height, width and channels.
      dtype: of the arithmetic; parameters and batch statistics stay float32, logits are float32.
      ops: `auto` for the fastest operations of each platform, whose gradients are of first order; `xla` for those of XLA alone,
        with forward mode and higher derivatives.

    Raises:
      UserError: there is no such network, it reads images and the examples are none, or they cannot be halved as often as it pools.
    """
    made = NETWORKS[name].make(width, num_classes, jnp.dtype(dtype))
    network = (
        made
        if isinstance(made, Network)
        else Network(tuple(made), make_head("linear", num_classes, dtype))
    )
    if not NETWORKS.is_shipped(name):
        _check_own(name, network)
    network = Network(
        tuple(with_ops(block, ops) for block in network.blocks), with_ops(network.classifier, ops)
    )
    step = 2**network.halvings
    if len(input_shape) != 3:
        if NETWORKS.is_shipped(name):
            raise UserError(
                f"config.model.name={name!r}: reads images (height, width, channels), not examples of shape {input_shape}; "
                "register a network of your own for them"
            )
        return network
    height, across, _ = input_shape
    if height % step or across % step or not height or not across:
        near = {
            size // step * step for size in (height, height + step - 1, across, across + step - 1)
        } - {0}
        raise UserError(
            f"config.data.image_size: images of {height}x{across} cannot be halved {network.halvings} times, as "
            f"config.model.name={name!r} does; multiples of {step} work, such as {' or '.join(map(str, sorted(near)))}"
        )
    return network


def _check_own(name: str, network: Network) -> None:
    parts = {f"block {i}": block for i, block in enumerate(network.blocks)} | {
        "the classifier": network.classifier
    }
    if len(parts) == 1:
        raise UserError(f"config.model.name={name!r}: the network has no block")
    for what, part in parts.items():
        if (
            not isinstance(part, nn.Module)
            or "train" not in inspect.signature(part.__call__).parameters
        ):
            kind = part.__name__ if isinstance(part, type) else type(part).__name__
            raise UserError(
                f"config.model.name={name!r}: {what} is {kind}, which is no Flax Linen module called as block(x, train); "
                "one of your own with that __call__ can wrap it"
            )
