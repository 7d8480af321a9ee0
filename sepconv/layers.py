"""The layers: depthwise, pointwise and separable convolution as ``torch.nn`` modules.

Depthwise and pointwise layers *are* ``nn.Conv1d/2d/3d`` (same attributes, same state_dict, same initialisation), so that
checkpoints, tools and exporters that know PyTorch's convolutions know these. Only the computation differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv import ops
from sepconv.reference import ACTIVATIONS
from sepconv.shapes import Padding, Size, as_tuple

Norm = str | Callable[[int], nn.Module] | None
Activation = str | Callable[[], nn.Module] | None

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _check_channels(name: str, **channels: int) -> None:
    for argument, value in channels.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {argument} must be a positive integer, got {value!r}")


def _copy_parameters(name: str, target: nn.Module, source: nn.Module) -> None:
    """Share the parameters of ``source`` (not copies: an optimizer that holds them keeps training them)."""
    for key, parameter in source.named_parameters(recurse=False):
        setattr(target, key, parameter)


class _Depthwise:
    """What depthwise layers of 1, 2 and 3 dimensions have in common; mixed in before ``nn.Conv1d/2d/3d``."""

    dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        depth_multiplier: int = 1,
    ) -> None:
        name, dims = type(self).__name__, self.dims
        _check_channels(name, in_channels=in_channels, depth_multiplier=depth_multiplier)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            in_channels * depth_multiplier,
            as_tuple(name, "kernel_size", kernel_size, dims, 1),
            as_tuple(name, "stride", stride, dims, 1),
            padding if isinstance(padding, str) else as_tuple(name, "padding", padding, dims, 0),
            as_tuple(name, "dilation", dilation, dims, 1),
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
