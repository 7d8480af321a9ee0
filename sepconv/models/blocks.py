"""The few pieces that every model here is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.ops.geometry import positive

Activation = Callable[[], nn.Module]


def check_settings(
    name: str, width_mult: float, num_classes: int, in_channels: int, dropout: float
) -> tuple[float, int, int]:
    """The settings that all models share, checked once and with the model's name in the message.

    Returns:
        width_mult, num_classes and in_channels as Python's own numbers.
    """
    num_classes, in_channels = (
        positive(name, setting, value)
        for setting, value in (("num_classes", num_classes), ("in_channels", in_channels))
    )
    if not _is_number(width_mult) or not 0 < width_mult < math.inf:
        raise ValueError(f"{name}: width_mult must be a positive number, got {width_mult!r}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout must be at least 0 and below 1, got {dropout!r}")
    return float(width_mult), num_classes, in_channels


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def conv_norm(conv: nn.Conv2d, activation: Activation | None = nn.ReLU6, eps: float = 1e-5) -> nn.Sequential:
    """A convolution, its batch normalisation and, unless None, its activation."""
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(conv.out_channels, eps=eps)]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """A normal 3x3 convolution without bias, since a batch normalisation follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding, bias=False)


def classifier_head(features: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))


def pool_and_classify(x: Tensor, classifier: nn.Module) -> Tensor:
    """(N, C, H, W) -> mean over the pixels (N, C) -> (N, num_classes)"""
    pooled = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
    return classifier(pooled)


def initialize(model: nn.Module) -> None:
    """Normal distributions after He et al. 2015, arXiv:1502.01852; the classifier starts near zero.

    A depthwise filter sees k*k inputs, which ``fan_out`` of PyTorch's initialiser overlooks (it multiplies by all
    channels).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            normal = module.groups == 1
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if normal else "fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
