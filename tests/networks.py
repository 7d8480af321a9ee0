"""Small networks in the manner of those that people bring: other names, other spellings, other layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers import SeparableConv2d
from sepconv.models import MobileNetV1, MobileNetV2


def randomise(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that show whether a batch norm was folded right; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


class SamePadded(nn.Module):
    """TensorFlow's padding with F.pad, ReLU6 as a clamp, eps 1e-3: as in ports of TensorFlow checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.dw = nn.Conv2d(8, 8, 3, 2, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3)
        self.pw = nn.Conv2d(8, 16, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(16, eps=1e-3)

    @staticmethod
    def pad(x: Tensor) -> Tensor:
        amounts = [max(3 - (size % 2 or 2), 0) for size in x.shape[2:]]
        (top, left) = (amount // 2 for amount in amounts)
        return F.pad(x, [left, amounts[1] - left, top, amounts[0] - top])

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.bn1(self.conv_stem(self.pad(pixel_values))).clamp(0, 6)
        x = torch.clamp(self.bn2(self.dw(self.pad(x))), min=0.0, max=6.0)
        return self.bn3(self.pw(x)).clamp_(min=0.0).clamp_(max=6.0)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise, LayerNorm channels last, linear layers with GELU, layer scale, residual (arXiv:2201.03545)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Mean, two 1x1 convolutions, gate (arXiv:1709.01507), with the hand-written activations of MobileNet v3."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, channels, 5, (2, 1), 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.reduce, self.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.project = nn.Conv2d(channels, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.expand(x))
        x = x * F.relu6(x + 3) / 6
        s = x.mean((2, 3), keepdim=True)
        s = F.relu(self.reduce(s), inplace=True)
        x = x * F.hardsigmoid(self.gate(s))
        y = self.project(x)
        return y * torch.sigmoid(y)


class Strided(nn.Module):
    """Strides (2, 1) and (1, 2), multiplier 2, dilation, even and 1x7 filters, ELU between, average pooling, concat."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(5, 10, 3, (2, 1), 1, groups=5)
        self.b = nn.Conv2d(10, 10, (1, 7), (1, 2), (0, 3), groups=10)
        self.c = nn.Conv2d(10, 6, 1)
        self.d = nn.Conv2d(6, 6, 4, 1, 2, dilation=2, groups=6)
        self.e = nn.Conv2d(12, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.b(F.silu(self.a(x))))
        x = F.hardswish(self.c(x))
        y = F.avg_pool2d(self.d(F.pad(x, (1, 0, 0, 1))), 3, 1, 1)[:, :, : x.shape[2], : x.shape[3]]
        return self.e(torch.cat([F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2])), x], 1))


class Converted(nn.Module):
    """What a conversion makes: several filters per channel, no activation between, a shortcut around."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SeparableConv2d(8, 8, 3, padding=1, depth_multiplier=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = SeparableConv2d(8, 8, 3, padding=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        return F.relu(self.second(y) + x)


class Several(nn.Module):
    """Two inputs, a flag, and a dict with a tuple, a number and an untouched input as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, image: Tensor, features: Tensor, scale: bool = False) -> dict[str, Any]:
        x = self.left(image) + self.right(self.norm(features))
        x = x * 2 if scale else x
        return {"maps": (x, x.flatten(2).argmax(-1)), "count": 3, "image": image}


class Reused(nn.Module):
    """One convolution with two batch norms, a branch that two read, a batch norm in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        self.norm1, self.norm2, self.before = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv(self.before(x))))
        z = self.norm2(self.conv(y))
        d = self.dw(z)
        return torch.relu_(self.conv(d)) + d + z.transpose(2, 3).contiguous().view(x.shape[0], -1)[:, :1, None, None]


class NearMisses(nn.Module):
    """Almost the activations that kernels know, and one convolution with different factors behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).clamp(0, 1)
        x = F.hardtanh(self.conv(x) * 2)
        x = F.gelu(self.conv(x) * 3, approximate="tanh")
        y = self.conv(x)
        x = y * torch.sigmoid(2 * y)
        y = self.conv(x)
        x = y * F.relu6(y + 2) / 6
        y = self.conv(x)
        x = y * F.relu6(y + 3) / 5
        y = self.conv(x).clamp(max=6)
        x = F.threshold(self.conv(y.clamp(-1, 6)), 0.1, 0)
        return torch.add(self.conv(x), x, alpha=2) - self.conv(F.pad(x, (1, 1), value=1.0))[..., 1:-1]


class Signal(nn.Module):
    """Separable convolution of one dimension, and a linear head on the flattened result."""

    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw = nn.Conv1d(6, 6, 5, padding=2, groups=6), nn.Conv1d(6, 9, 1)
        self.norm, self.head = nn.BatchNorm1d(9), nn.Linear(9 * 11, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.pw(self.dw(x)))).flatten(1))


def image(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


# Name -> (how to make it, how to make its inputs).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "mobilenet_v1": (lambda: MobileNetV1(0.25, num_classes=7), image(2, 3, 45, 33)),
    "mobilenet_v1_tf_padding": (lambda: MobileNetV1(0.25, num_classes=7, tf_padding=True), image(1, 3, 46, 33)),
    "mobilenet_v2": (lambda: MobileNetV2(0.1, num_classes=7), image(1, 3, 37, 64)),
    "same_padded": (SamePadded, image(2, 3, 17, 22)),
    "convnext_block": (ConvNeXtBlock, image(2, 8, 9, 7)),
    "squeeze_excite": (SqueezeExcite, image(2, 8, 13, 11)),
    "strided": (Strided, image(2, 5, 13, 17)),
    "converted": (Converted, image(2, 8, 11, 13)),
    "several": (Several, lambda: (torch.randn(2, 3, 9, 7), torch.randn(2, 8, 9, 7), True)),
    "reused": (Reused, image(2, 8, 7, 7)),
    "near_misses": (NearMisses, image(2, 8, 7, 9)),
    "signal": (Signal, image(3, 6, 11)),
}


def images_for(model: nn.Module, height: int = 32, width: int = 32, batch: int = 3) -> Tensor:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return torch.randn(batch, first.in_channels, height, width)


def classes_of(model: nn.Module) -> int:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1].out_features
