"""Networks that are trained in benchmarks, each as we build it and in plain PyTorch with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.convert import convert
from sepconv.layers import DepthwiseConv2d, PointwiseConv2d, SeparableConv2d
from sepconv.models import MobileNetV1, MobileNetV2, create


@dataclass(frozen=True)
class TrainingCase:
    """A network, the size of its square images and how many are in a batch."""

    network: str
    make: Callable[[], nn.Module]
    side: int
    batch: int
    channels: int = 3

    @property
    def name(self) -> str:
        return f"{self.network}-{self.side} b{self.batch}"

    def model(self) -> nn.Module:
        """The network with random weights, the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.channels, self.side, self.side, generator=generator)
        return x.contiguous(memory_format=torch.channels_last)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over the channels of each pixel, pointwise to four times the channels and back.

    Reference: Liu et al. 2022, arXiv:2201.03545.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.activation = nn.GELU()
        self.project = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.project(self.activation(self.expand(y)))


class _Classified(nn.Module):
    """A part of a network, the mean over its pixels as scores."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.parts(x), 1).flatten(1)


def _convnext() -> nn.Module:
    return _Classified(*(ConvNeXtBlock(96) for _ in range(3)))


def _converted(name: str, form: str) -> nn.Module:
    """As ``convert`` writes it for 1/8 of the weights."""
    return convert(create(name).eval(), None, form=form, method="svd")[0]


CASES = (
    TrainingCase("mobilenet_v1_0.5", partial(MobileNetV1, 0.5), 96, 32),
    TrainingCase("mobilenet_v1_1.0", MobileNetV1, 224, 8),
    TrainingCase("mobilenet_v2_1.0", MobileNetV2, 96, 32),
    TrainingCase("convnext_stage", _convnext, 56, 8, 96),
    *(
        TrainingCase(f"{name}_{form}", partial(_converted, name, form), 32, 128)
        for name in ("vgg_quick", "resnet_quick")
        for form in ("bottleneck", "separable")
    ),
)
CASES_BY_NAME = {case.name: case for case in CASES}


def in_pytorch(model: nn.Module) -> nn.Module:
    """A copy made of ``nn.Conv2d`` alone, with the same weights."""
    new = copy.deepcopy(model)
    _replace_children(new)
    return new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _replace_children(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        plain = _plain(child)
        if plain is None:
            _replace_children(child)
        else:
            setattr(module, name, plain.train(child.training))


def _plain(module: nn.Module) -> nn.Module | None:
    if isinstance(module, SeparableConv2d):
        parts: list[nn.Module | None] = []
        for conv, norm, activation in module.stages:
            parts += [_plain(conv), norm, copy.deepcopy(activation)]
        return nn.Sequential(*(part for part in parts if part is not None))
    return _plain_conv(module) if isinstance(module, (DepthwiseConv2d, PointwiseConv2d)) else None


def _plain_conv(layer: Any) -> nn.Conv2d:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    conv = nn.Conv2d(*sizes, groups=layer.groups, bias=layer.bias is not None)
    conv.load_state_dict(layer.state_dict())
    return conv
