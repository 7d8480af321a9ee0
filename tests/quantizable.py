"""Small networks for the tests of quantization, with what makes integers hard."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers import SeparableConv2d


def with_statistics(model: nn.Module, seed: int = 0) -> Any:
    """Batch norms as after training: means, variances and factors that differ from channel to channel."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            module.running_mean = 0.3 * torch.randn(size, generator=draw)
            module.running_var = torch.rand(size, generator=draw) + 0.3
            module.weight.data = torch.rand(size, generator=draw) + 0.5
            module.bias.data = 0.3 * torch.randn(size, generator=draw)
    return model.eval()


def scaled_by_channel(model: nn.Module, seed: int = 0) -> Any:
    """The same function, with every output of a depthwise layer times a power of two that its norm divides by."""
    draw = torch.Generator().manual_seed(seed)
    for conv, norm in pairwise(model.modules()):
        if isinstance(conv, nn.Conv2d) and conv.groups > 1 and isinstance(norm, nn.BatchNorm2d):
            factor = torch.exp2(torch.randint(-6, 7, (conv.out_channels,), generator=draw).float())
            conv.weight.data *= factor.view(-1, 1, 1, 1)
            norm.running_mean *= factor
            norm.weight.data /= factor
    return model


class Blocks(nn.Module):
    """A stem, a separable layer, a shortcut, functional code, changes in place, a pool and a classifier."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), activation())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), activation())
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), activation()
        )
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.separable = SeparableConv2d(8, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        x = F.relu(self.separable(x), inplace=True)
        return self.classifier(x.mean((2, 3)))


def images(count: int = 80, size: int = 16, seed: int = 1) -> Tensor:
    """Smooth ones: neighbouring pixels are alike."""
    draw = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, size // 4, size // 4, generator=draw)
    return F.interpolate(small, size=(size, size), mode="bilinear") + 0.1 * torch.randn(
        count, 3, size, size, generator=draw
    )
