"""Bottleneck residual networks for ImageNet in PyTorch, as published, and their training step."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

STAGES = {"resnet50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}


def _convolution(inputs: int, features: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, features, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(features))


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 (with the stride) and a 1x1 convolution to 4 x `features`."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, features),
            nn.ReLU(inplace=True),
            _convolution(features, features, 3, stride),
            nn.ReLU(inplace=True),
            _convolution(features, 4 * features),
        )
        same = stride == 1 and inputs == 4 * features
        self.shortcut = nn.Identity() if same else _convolution(inputs, 4 * features, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the maps of the block."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet(name: str, width: int, classes: int) -> nn.Sequential:
    """Builds a network whose first stage has `width` channels, 64 in the published ones."""
    layers: list[nn.Module] = [
        _convolution(3, width, 7, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, blocks in enumerate(STAGES[name]):
        features = width * 2**stage
        for block in range(blocks):
            layers.append(Bottleneck(inputs, features, 2 if stage and not block else 1))
            inputs = 4 * features
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    return nn.Sequential(*layers, *head)


class Training:
    """Back-propagation of a network with channels last, autocast and fused SGD.

    Args:
      network: the network.
      device: device to train on.
      dtype: dtype of the convolutions and matrix products.
      compiled: mode of `torch.compile`; "" compiles nothing.
    """

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype, compiled: str = ""):
        self.network = network.to(device, memory_format=torch.channels_last)
        self.device, self.dtype, self.compiled = torch.device(device), dtype, compiled
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True
        )
        if compiled:
            network.compile(mode=compiled, dynamic=False)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> Sequence[torch.Tensor]:
        """Updates the network once.

        Args:
          images: images on the device, uint8, [B, H, W, C].
          labels: class labels on the device, [B].

        Returns:
          The loss, as the only element.
        """
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        x = (images.to(torch.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.network(x), labels)
        loss.backward()
        self.optimizer.step()
        return [loss.detach().clone()]
