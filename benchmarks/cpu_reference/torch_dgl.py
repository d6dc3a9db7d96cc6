"""Decoupled Greedy Learning of the 6-layer CNN in PyTorch: same blocks, heads, losses and updates.

It is written as fast as PyTorch allows. Each module has an optimizer (SGD with momentum) and
detaches its input. A single module is back-propagation. Feature maps are [B, C, H, W].
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from dgl_jax.run.build import Experiment

MULTIPLES = (1, 2, 2, 4, 4, 4)  # channels of each block of cnn6, divided by the width
POOLED = (1, 3)  # blocks of cnn6 that begin with pooling


class Module(nn.Module):
    """Consecutive blocks and the head that computes their local loss."""

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the feature maps for the next module, and the local loss."""
        for part in self.blocks:
            x = part(x)
        # Detached: compiled graphs would add a gradient of zero to an output that has one.
        return x.detach(), F.cross_entropy(self.head(x), target)


def block(inputs: int, features: int, pool: bool) -> nn.Sequential:
    """Builds a block: [2x2 max pooling] - 3x3 convolution - batch norm - ReLU."""
    layers = [
        nn.Conv2d(inputs, features, 3, padding=1),
        nn.BatchNorm2d(features),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*[nn.MaxPool2d(2)] * pool, *layers)


def head(features: int, size: int, classes: int, convs: int, hidden: int) -> nn.Sequential:
    """Builds a head for maps of `size` x `size` pixels.

    MLP-SR has `convs` = 3 and `hidden` = 3; the classifier at the end of the network has 0 and 2.
    """
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
    """Six-layer CNN that is cut into modules, with its training step.

    Args:
      width: channels of the first block.
      starts: index of the first block of each module.
      image_size: height and width of the images in pixels.
      classes: number of classes.
      rate: learning rate of SGD.
      momentum: momentum of SGD.
      decay: weight decay of SGD, applied to every parameter.
      mean: mean of each channel, for images scaled to 0..1.
      std: standard deviation of each channel, for images scaled to 0..1.
      channels_last: uses the channels-last memory format for maps and kernels.
      device: device of the parameters and of all computations.
      dtype: dtype of the convolutions and matrix products; others than float32 use autocast.
      compiled: mode of `torch.compile` for each module, such as "default"; "" compiles nothing.
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
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: str = "",
    ):
        blocks, sizes, inputs, size = [], [], 3, image_size
        for number, multiple in enumerate(MULTIPLES):
            blocks.append(block(inputs, width * multiple, number in POOLED))
            inputs, size = width * multiple, size // 2 if number in POOLED else size
            sizes.append((inputs, size))
        ends = [*starts[1:], len(blocks)]
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.device, self.dtype, self.compiled = torch.device(device), dtype, compiled
        self.modules = []
        for first, end in zip(starts, ends, strict=True):
            last = end == len(blocks)
            layers = head(*sizes[end - 1], classes, convs=0 if last else 3, hidden=2 if last else 3)
            module = Module(blocks[first:end], layers).to(self.device, memory_format=self.format)
            if compiled:
                module.compile(mode=compiled, dynamic=False)
            self.modules.append(module)
        self.optimizers = [
            torch.optim.SGD(
                m.parameters(), lr=rate, momentum=momentum, weight_decay=decay, fused=True
            )
            for m in self.modules
        ]
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=self.device)
        self.shift = torch.tensor(
            [-m / s for m, s in zip(mean, std, strict=True)], device=self.device
        )

    def step(
        self, images: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor
    ) -> list[torch.Tensor]:
        """Updates every module once.

        Args:
          images: images as stored, uint8, [B, H, W, C].
          labels: class labels, [B].

        Returns:
          The loss of each module, as tensors that have not been read yet.
        """
        if self.compiled:
            # The CUDA graphs of all modules belong to one step: without this, the graph of a module
            # could overwrite the maps that it reads.
            torch.compiler.cudagraph_mark_step_begin()
        x = torch.as_tensor(images, device=self.device).to(torch.float32) * self.scale + self.shift
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=self.format)
        target, losses = torch.as_tensor(labels, device=self.device).long(), []
        mixed = self.dtype != torch.float32
        for module, optimizer in zip(self.modules, self.optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, self.dtype, enabled=mixed):
                x, loss = module(x, target)
            loss.backward()
            optimizer.step()
            x = x.detach()
            losses.append(loss.detach().clone() if self.compiled else loss.detach())
        return losses

    def copy_from(self, params: Sequence[Mapping[str, Any]]) -> None:
        """Copies the parameters of each module of a JAX run."""
        with torch.no_grad():
            for parameter, array in zip(
                self._parameters(), translated(self.modules, params), strict=True
            ):
                parameter.copy_(torch.from_numpy(array.copy()))

    def distances(
        self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Computes the distance of each parameter array from that of a JAX run after one update.

        The unit is the length of the JAX update, but at least a thousandth of the length of the
        array: the bias of a convolution in front of batch norm has a gradient of rounding errors.

        Args:
          before: parameters of the JAX run before the update, one tree per module.
          after: parameters of the JAX run after the update.
        """
        relative = []
        pairs = zip(translated(self.modules, before), translated(self.modules, after), strict=True)
        for parameter, (old, new) in zip(self._parameters(), pairs, strict=True):
            length = max(np.linalg.norm(new - old), 1e-3 * np.linalg.norm(new))
            relative.append(float(np.linalg.norm(parameter.detach().numpy() - new) / length))
        return relative

    def _parameters(self) -> list[nn.Parameter]:
        return [
            p
            for m in self.modules
            for layer in layers_of(m)
            for p in (layer.weight, layer.bias)
            if p is not None
        ]


def counterpart(experiment: "Experiment", memory_format: str, **changed: Any) -> DGL:
    """Builds the network with the cuts, images and optimizer of an experiment.

    Args:
      experiment: run of the 6-layer CNN under DGL, or with one module.
      memory_format: channels_last or contiguous.
      **changed: further arguments of `DGL`, or other values of the optimizer's.
    """
    settings: Any = experiment.settings.optimizer  # the options of sgd
    data = experiment.source
    update = {
        "rate": settings.learning_rate,
        "momentum": settings.momentum,
        "decay": settings.weight_decay,
    }
    return DGL(
        experiment.settings.model.width,
        [module.first for module in experiment.spec.modules],
        data.example_shape[0],
        data.num_classes,
        **update | changed,
        mean=data.mean,
        std=data.std,
        channels_last=memory_format == "channels_last",
    )


def layers_of(module: Module) -> list[Any]:
    """Returns the layers that have parameters, in the order of the forward pass."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.BatchNorm1d | nn.Linear)
    ]


def translated(modules: Sequence[Module], params: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Converts Flax parameters to PyTorch's layout, in the order of `layers_of`."""
    arrays = []
    for module, tree in zip(modules, params, strict=True):
        blocks = sorted(tree["body"].items(), key=lambda item: int(item[0].removeprefix("block_")))
        for part, part_params in [
            *zip(module.blocks, (p for _, p in blocks), strict=True),
            (module.head, tree["objective"]),
        ]:
            arrays += _part(part, part_params)
    return arrays


def _part(part: nn.Module, params: Mapping[str, Any]) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    count = {"Conv": 0, "BatchNorm": 0, "Dense": 0}
    for layer in layers_of(part):
        kind = {nn.Conv2d: "Conv", nn.Linear: "Dense"}.get(type(layer), "BatchNorm")
        layer_params = {
            name: np.asarray(value) for name, value in params[f"{kind}_{count[kind]}"].items()
        }
        weight = layer_params["scale" if kind == "BatchNorm" else "kernel"]
        if kind == "Conv":
            weight = weight.transpose(3, 2, 0, 1)
        elif kind == "Dense" and count[kind] == 0:
            # Reads a flattened 2x2 map, in which PyTorch has channels first and Flax has them last.
            weight = (
                weight.reshape(4, -1, weight.shape[1])
                .transpose(2, 1, 0)
                .reshape(weight.shape[1], -1)
            )
        elif kind == "Dense":
            weight = weight.T
        arrays += [weight, layer_params["bias"]] if "bias" in layer_params else [weight]
        count[kind] += 1
    assert sum(count.values()) == len(params), (
        f"{len(params)} layers in Flax, {sum(count.values())} in PyTorch"
    )
    return arrays
