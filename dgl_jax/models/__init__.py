"""Networks, heads, adapters and the partition into modules; nothing here depends on training."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dgl_jax.config.registry import ADAPTERS, HEADS, NETWORKS, Kind
from dgl_jax.errors import UserError
from dgl_jax.models.adapters import Adapter, AdapterKind, ContextInput
from dgl_jax.models.cnn import cnn3, cnn4, cnn6, cnn6_replay
from dgl_jax.models.heads import HeadKind, make_head
from dgl_jax.models.network import Network, with_choices
from dgl_jax.models.partition import BALANCED, BlockCosts, cuts
from dgl_jax.models.resnet import cifar_resnet, imagenet_resnet, resnet18_cifar
from dgl_jax.models.synthesizers import Synthesizer
from dgl_jax.models.vgg import vgg_bn

__all__ = [
    "ADAPTERS",
    "BALANCED",
    "HEADS",
    "NETWORKS",
    "Adapter",
    "AdapterKind",
    "BlockCosts",
    "ContextInput",
    "HeadKind",
    "Network",
    "NetworkKind",
    "Synthesizer",
    "cuts",
    "make_head",
    "make_network",
    "register_adapter",
    "register_head",
    "register_network",
    "with_choices",
]


@dataclass(frozen=True)
class NetworkKind(Kind):
    """Registry entry of a network.

    `make(width, num_classes, dtype)` returns a `Network`, or a list of blocks, which then gets the
    `linear` head as its classifier.

    Blocks are Flax Linen modules called as `block(x, train)`. The first one takes images
    [B, H, W, C] or other inputs that the task defines; all return features that heads accept,
    [B, H, W, C] or [B, T, C]. The network may be cut between any two blocks. If a block has a field
    `ops`, it is set to `config.model.ops`; the block passes it to the layers of this package.
    """


NETWORKS.ship(
    cnn4=NetworkKind(cnn4),
    cnn6=NetworkKind(cnn6),
    cnn6_replay=NetworkKind(cnn6_replay),
    cnn3=NetworkKind(cnn3),
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
    """Registers a network, so that `config.model.name=<name>` selects it.

    A run looks its network up by name when it is resumed, evaluated, used or exported. List the
    Python module that registers the network in `config.plugins`.

    Args:
      name: the name in the configuration.
      make: the factory, or a kind; see `NetworkKind`.

    Raises:
      UserError: the package itself has a network of this name.
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
    """Creates a registered network.

    Args:
      name: name of the network.
      width: channels of the first block.
      num_classes: number of classes of the classifier.
      input_shape: shape of an example as the network reads it; [H, W, C] for images.
      dtype: dtype of the arithmetic. Parameters, batch statistics and logits are float32.
      ops: formulation of the operations, `auto` or `xla`; see `dgl_jax.ops`.

    Returns:
      The description of the network, without parameters.

    Raises:
      UserError: there is no network of this name; it reads images but the examples are no images;
        or the height or width cannot be halved as often as the network does.
    """
    result = NETWORKS[name].make(width, num_classes, jnp.dtype(dtype))
    network = (
        result
        if isinstance(result, Network)
        else Network(tuple(result), make_head("linear", num_classes, dtype))
    )
    if not NETWORKS.is_shipped(name):
        _check_user_network(name, network)
    network = Network(
        tuple(with_choices(block, ops=ops) for block in network.blocks),
        with_choices(network.classifier, ops=ops),
    )
    step = 2**network.halvings
    if len(input_shape) != 3:
        if NETWORKS.is_shipped(name):
            raise UserError(
                f"config.model.name={name!r}: reads images (height, width, channels), not examples "
                f"of shape {input_shape}; register your own network for them"
            )
        return network
    # Not named `width`, which is the number of channels.
    height, columns, _ = input_shape
    if height % step or columns % step or not height or not columns:
        nearest = {
            size // step * step for size in (height, height + step - 1, columns, columns + step - 1)
        } - {0}
        raise UserError(
            f"config.data.image_size: images of {height}x{columns} cannot be halved "
            f"{network.halvings} times, as config.model.name={name!r} does; multiples of {step} "
            f"work, such as {' or '.join(map(str, sorted(nearest)))}"
        )
    return network


def _check_user_network(name: str, network: Network) -> None:
    """Raises UserError if a block or the classifier is not a module called as `block(x, train)`."""
    parts = {f"block {i}": block for i, block in enumerate(network.blocks)} | {
        "the classifier": network.classifier
    }
    if len(parts) == 1:
        raise UserError(
            f"config.model.name={name!r}: the network has no blocks; it needs at least one"
        )
    for label, part in parts.items():
        if (
            not isinstance(part, nn.Module)
            or "train" not in inspect.signature(part.__call__).parameters
        ):
            kind = part.__name__ if isinstance(part, type) else type(part).__name__
            raise UserError(
                f"config.model.name={name!r}: {label} is {kind}, which is not a Flax Linen module "
                "called as block(x, train); wrap it in a module with that __call__"
            )
