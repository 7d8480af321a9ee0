"""Separable layers: a depthwise and one or more pointwise layers, with norm and activation after each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sepconv.activations import ACTIVATIONS, NAMES, is_name
from sepconv.layers.conv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    DepthwiseConv3d,
    PointwiseConv1d,
    PointwiseConv2d,
    PointwiseConv3d,
)
from sepconv.layers.fused import at_once
from sepconv.layers.stage import Stage
from sepconv.layers.training import finished
from sepconv.ops.geometry import Padding, Size, positive

Norm = str | Callable[[int], nn.Module] | None
Activation = str | Callable[[], nn.Module] | None

_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DEPTHWISE: dict[int, Any] = {1: DepthwiseConv1d, 2: DepthwiseConv2d, 3: DepthwiseConv3d}
_POINTWISE: dict[int, Any] = {1: PointwiseConv1d, 2: PointwiseConv2d, 3: PointwiseConv3d}


def _make_norm(name: str, norm: Norm, dims: int, channels: int) -> nn.Module | None:
    if norm is None:
        return None
    if norm == "batch":
        return _BATCH_NORM[dims](channels)
    if not callable(norm):
        raise ValueError(f"{name}: norm must be None, 'batch' or a callable of the channels, got {norm!r}")
    return norm(channels)


def _make_activation(name: str, activation: Activation) -> nn.Module | None:
    if activation is None:
        return None
    if callable(activation):
        return activation()
    if not activation or not is_name(activation):
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"{name}: activation must be None, a callable or one of {known}, got {activation!r}")
    return ACTIVATIONS[activation].module()


class _SeparableConv(nn.Module):
    """What separable layers of all dimensions share."""

    dims: ClassVar[int]
    waits = False  # whether its result may wait for the next layer, in training: see ``layers.training``

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
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
        norm: Norm = None,
        activation: Activation = None,
        pointwise_layers: int = 1,
        depthwise_bias: bool | None = None,
    ) -> None:
        super().__init__()
        name, dims = type(self).__name__, self.dims
        out_channels = positive(name, "out_channels", out_channels)
        pointwise_layers = positive(name, "pointwise_layers", pointwise_layers)
        has_bias = bias if depthwise_bias is None else depthwise_bias
        geometry = (kernel_size, stride, padding, dilation)
        self.depthwise = _DEPTHWISE[dims](
            in_channels, *geometry, has_bias, padding_mode, device, dtype, depth_multiplier=depth_multiplier
        )
        channels = self.depthwise.out_channels
        self.depthwise_norm = _make_norm(name, norm, dims, channels)
        factory = {"device": device, "dtype": dtype}
        self.pointwise = _POINTWISE[dims](channels, out_channels, bias=bias, **factory)
        self.pointwise_norm = _make_norm(name, norm, dims, out_channels)
        self.activation = _make_activation(name, activation)
        self.pointwise_layers = pointwise_layers
        for i in range(2, pointwise_layers + 1):
            layer = _POINTWISE[dims](out_channels, out_channels, bias=bias, **factory)
            self.add_module(f"pointwise{i}", layer)
            self.add_module(f"pointwise{i}_norm", _make_norm(name, norm, dims, out_channels))
        for module in self.children():
            module.to(device=device, dtype=dtype)

    @property
    def in_channels(self) -> int:
        return int(self.depthwise.in_channels)

    @property
    def out_channels(self) -> int:
        return int(self.pointwise.out_channels)

    def _names(self) -> list[str]:
        """Of the convolutions, in order."""
        return ["depthwise", "pointwise", *[f"pointwise{i}" for i in range(2, self.pointwise_layers + 1)]]

    @property
    def stages(self) -> list[Stage]:
        """Each convolution with the norm and the activation behind it, as they are now."""
        activation = self._part("activation")
        found = [Stage(self._part(name), self._part(f"{name}_norm"), activation) for name in self._names()]
        for conv, norm, _ in found:
            if norm is not None and getattr(conv, "waits", None) is False:
                conv.waits = True
        return found

    def _part(self, name: str) -> Any:
        """An attribute, for which ``nn.Module`` would look in three places before it looks among the modules."""
        return self._modules[name] if name in self._modules else getattr(self, name)

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles: the same modules one after the other, with their names in the state_dict."""
        if type(self).__module__ != __name__:
            return self
        parts: OrderedDict[str, nn.Module | None] = OrderedDict()
        for i, (name, stage) in enumerate(zip(self._names(), self.stages, strict=True)):
            keys = (name, f"{name}_norm", f"activation{i or ''}")
            parts.update(zip(keys, stage, strict=True))
        sequence = nn.Sequential(OrderedDict((key, part) for key, part in parts.items() if part is not None))
        sequence.training = self.training
        return sequence

    def forward(self, input: Tensor) -> Tensor:  # by the name that it has in nn.Conv2d
        stages = self.stages
        # Between two convolutions that wait, what a way back would compute again is kept instead.
        y = None if self.waits and torch.is_grad_enabled() else at_once(input, stages)
        if y is None:
            y = input
            for stage in stages:
                y = stage(y)
        return y if self.waits else finished(y)

    @classmethod
    def from_conv(cls: Any, depthwise: nn.Module, pointwise: nn.Module) -> Any:
        """A depthwise and a pointwise ``nn.Conv`` as one layer, sharing their parameters.

        To separate a *normal* convolution, use ``sepconv.convert``.

        Raises:
            TypeError, ValueError: they are not such convolutions, or do not fit together.
        """
        first = _DEPTHWISE[cls.dims].from_conv(depthwise)
        second = _POINTWISE[cls.dims].from_conv(pointwise)
        if first.out_channels != second.in_channels:
            raise ValueError(
                f"{cls.__name__}.from_conv: the depthwise convolution has {first.out_channels} output channels but the "
                f"pointwise one has in_channels={second.in_channels}"
            )
        if any(step != 1 for step in second.stride):
            raise ValueError(f"{cls.__name__}.from_conv: the pointwise stride must be 1, got {second.stride}")
        layer = cls(first.in_channels, second.out_channels, first.kernel_size, device="meta")
        layer.depthwise, layer.pointwise = first, second
        return layer.train(depthwise.training)


class SeparableConv1d(_SeparableConv):
    """Depthwise separable convolution of signals; see :class:`SeparableConv2d`.

    Shape:
        x: (N, C, L)    ->    (N, O, Lo)
    """

    dims = 1


class SeparableConv2d(_SeparableConv):
    """Depthwise separable convolution: a depthwise convolution, then a pointwise (1x1) one.

    Equivalent to ``pointwise(depthwise(x))`` with a norm and an activation after each where they are asked for, as in
    MobileNet: depthwise -> norm -> activation -> pointwise -> norm -> activation.

    Args:
        in_channels: channels of the input, C.
        out_channels: channels of the output, O.
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise convolution, as in ``nn.Conv2d``.
        bias: of both convolutions; ``depthwise_bias`` overrules it for the first.
        depth_multiplier: depthwise filters per input channel, M.
        norm: after each convolution: None, "batch", or a callable that makes a module for a number of channels.
        activation: after each (norm): None, a name in ``sepconv.activations.NAMES`` ("relu", "leaky_relu(0.2)"), or a
            callable that makes a module.
        pointwise_layers: pointwise convolutions in a row, each with its norm and activation; the further ones are
            called ``pointwise2``, ``pointwise3``, ...

    Shape:
        x: (N, C, H, W)    ->    (N, O, Ho, Wo),  Ho = (H + 2*padding - dilation*(kH-1) - 1) // stride + 1
        depthwise.weight: (C*M, 1, kH, kW)    pointwise.weight: (O, C*M, 1, 1)

    Cost per image: C*M*kH*kW*Ho*Wo + C*M*O*Ho*Wo multiply-adds.

    Example:
        >>> import torch
        >>> SeparableConv2d(32, 64, 3, padding=1)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 64, 8, 8])

    Reference: Sifre 2014; Howard et al. 2017, arXiv:1704.04861.
    """

    dims = 2


class SeparableConv3d(_SeparableConv):
    """Depthwise separable convolution of volumes; see :class:`SeparableConv2d`.

    Shape:
        x: (N, C, D, H, W)    ->    (N, O, Do, Ho, Wo)
    """

    dims = 3
