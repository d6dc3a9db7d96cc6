"""Decoupled Greedy Learning of the six-layer CNN in PyTorch: the same blocks, heads, losses and updates, in its own best form.

Each module has its own optimizer (SGD with momentum), and its input is detached. Maps are (B, C, H, W).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MULTIPLES, POOLED = (
    (1, 2, 2, 4, 4, 4),
    (1, 3),
)  # of cnn6: channels over width, blocks that begin with pooling


class Module(nn.Module):
    """Consecutive blocks and the head that gives them a loss of their own."""

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head


def block(inputs: int, features: int, pool: bool) -> nn.Sequential:
    """[2x2 max pooling] - 3x3 convolution - batch norm - ReLU."""
    layers = [
        nn.Conv2d(inputs, features, 3, padding=1),
        nn.BatchNorm2d(features),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*[nn.MaxPool2d(2)] * pool, *layers)


def head(features: int, size: int, classes: int, convs: int, hidden: int) -> nn.Sequential:
    """MLP-SR (`convs` = 3, `hidden` = 3), or the classifier that ends the network (0, 2), for maps of `size` pixels a side."""
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(max(-(-size // 4), 2))]
    for _ in range(convs):
        layers += [
            nn.Conv2d(features, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        ]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(hidden):
        layers += [
            nn.Linear(4 * features, 4 * features),
            nn.BatchNorm1d(4 * features),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Linear(4 * features, classes))


class DGL:
    """The six-layer CNN cut into modules, and its training step.

    Args:
      starts: first block of each module.
      rate, momentum, decay: of SGD; the decay is of every parameter.
      channels_last: the memory format of maps and kernels.
    """

    def __init__(
        self,
        width: int,
        starts: Sequence[int],
        image_size: int,
        classes: int,
        *,
        rate: float,
        momentum: float,
        decay: float,
        mean: Sequence[float],
        std: Sequence[float],
        channels_last: bool,
    ):
        blocks, sizes, inputs, size = [], [], 3, image_size
        for number, multiple in enumerate(MULTIPLES):
            blocks.append(block(inputs, width * multiple, number in POOLED))
            inputs, size = width * multiple, size // 2 if number in POOLED else size
            sizes.append((inputs, size))
        ends = [*starts[1:], len(blocks)]
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.modules = []
        for first, end in zip(starts, ends, strict=True):
            last = end == len(blocks)
            own = head(*sizes[end - 1], classes, convs=0 if last else 3, hidden=2 if last else 3)
            self.modules.append(Module(blocks[first:end], own).to(memory_format=self.format))
        self.optimizers = [
            torch.optim.SGD(
                m.parameters(), lr=rate, momentum=momentum, weight_decay=decay, fused=True
            )
            for m in self.modules
        ]
        self.scale = torch.tensor([1 / (255 * s) for s in std])
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])

    def step(self, images: np.ndarray, labels: np.ndarray) -> list[torch.Tensor]:
        """One update of every module on images as stored, (B, H, W, C) in uint8; gives the losses, not yet read."""
        x = torch.from_numpy(images).to(torch.float32) * self.scale + self.shift
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=self.format)
        target, losses = torch.from_numpy(labels).long(), []
        for module, optimizer in zip(self.modules, self.optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for part in module.blocks:
                x = part(x)
            loss = F.cross_entropy(module.head(x), target)
            loss.backward()
            optimizer.step()
            x = x.detach()
            losses.append(loss.detach())
        return losses

    def copy_from(self, params: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the parameters of each module of a JAX run."""
        with torch.no_grad():
            for own, given in zip(
                self._parameters(), translated(self.modules, params), strict=True
            ):
                own.copy_(torch.from_numpy(given.copy()))

    def distances(
        self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Of each parameter array: how far it is from where one update took the JAX run's, in units of the length of that update.

        An update shorter than a thousandth of the array counts as that long: the bias of a convolution in front of batch norm
        has no gradient but rounding errors.
        """
        found = []
        pairs = zip(translated(self.modules, before), translated(self.modules, after), strict=True)
        for own, (old, new) in zip(self._parameters(), pairs, strict=True):
            length = max(np.linalg.norm(new - old), 1e-3 * np.linalg.norm(new))
            found.append(float(np.linalg.norm(own.detach().numpy() - new) / length))
        return found

    def _parameters(self) -> list[nn.Parameter]:
        return [
            p
            for m in self.modules
            for layer in layers_of(m)
            for p in (layer.weight, layer.bias)
            if p is not None
        ]


def layers_of(module: Module) -> list[Any]:
    """Layers with parameters, in the order in which they work."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.BatchNorm1d | nn.Linear)
    ]


def translated(modules: Sequence[Module], params: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Flax parameters as PyTorch's arrays, in the order of `layers_of`, the weight before the bias."""
    found = []
    for module, of_module in zip(modules, params, strict=True):
        blocks = sorted(
            of_module["body"].items(), key=lambda item: int(item[0].removeprefix("block_"))
        )
        for part, own in [
            *zip(module.blocks, (p for _, p in blocks), strict=True),
            (module.head, of_module["objective"]),
        ]:
            found += _part(part, own)
    return found


def _part(part: nn.Module, params: Mapping[str, Any]) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    count = {"Conv": 0, "BatchNorm": 0, "Dense": 0}
    for layer in layers_of(part):
        kind = {nn.Conv2d: "Conv", nn.Linear: "Dense"}.get(type(layer), "BatchNorm")
        own = {name: np.asarray(value) for name, value in params[f"{kind}_{count[kind]}"].items()}
        weight = own["scale" if kind == "BatchNorm" else "kernel"]
        if kind == "Conv":
            weight = weight.transpose(3, 2, 0, 1)
        elif (
            kind == "Dense" and count[kind] == 0
        ):  # reads a flattened 2x2 map, whose channels come first here and last there
            weight = (
                weight.reshape(4, -1, weight.shape[1])
                .transpose(2, 1, 0)
                .reshape(weight.shape[1], -1)
            )
        elif kind == "Dense":
            weight = weight.T
        found += [weight, own["bias"]] if "bias" in own else [weight]
        count[kind] += 1
    assert sum(count.values()) == len(params), (
        f"{len(params)} layers there, {sum(count.values())} here"
    )
    return found
