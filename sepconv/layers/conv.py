"""Depthwise and pointwise layers.

They *are* ``nn.Conv1d/2d/3d`` (same attributes, same state_dict, same initialisation), so that
checkpoints, tools and exporters that know PyTorch's convolutions know these. Only the computation differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from sepconv import ops
from sepconv.layers import direct
from sepconv.layers.training import waiting
from sepconv.ops import pending, tracing
from sepconv.ops.geometry import Padding, Size, as_tuple, positive

Layer = TypeVar("Layer", bound="nn.Module")

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _check_conv(cls: Any, conv: Any) -> None:
    expected = _CONV[cls.dims]
    if not isinstance(conv, expected):
        raise TypeError(f"{cls.__name__}.from_conv: needs an nn.{expected.__name__}, got {type(conv).__name__}")


def _check_padding_mode(name: str, padding_mode: str) -> None:
    modes = ("zeros", "reflect", "replicate", "circular")
    if padding_mode not in modes:
        raise ValueError(f"{name}: padding_mode must be one of {', '.join(modes)}, got {padding_mode!r}")


def _share_parameters(target: Layer, source: nn.Module) -> Layer:
    """Take over the parameters themselves: an optimizer that holds them goes on training them."""
    target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)


def _learned(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer computes alone; whether PyTorch does it is known the next time."""
    y: Tensor = layer.alone(x, weight, bias)
    direct.learn(layer, x, weight, bias)
    return y


class _Scriptable:
    """TorchScript compiles PyTorch's own layer, over the same parameters."""

    def __prepare_scriptable__(self: Any) -> nn.Module:
        if type(self).__module__ != __name__:
            return self  # somebody's own layer, which may do something else
        conv = _CONV[self.dims](
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device="meta",
        )  # fmt: skip
        return _share_parameters(conv, self)


class _DepthwiseConv(_Scriptable):
    """What depthwise layers of all dimensions share; stands before ``nn.Conv1d/2d/3d`` among the bases."""

    dims: ClassVar[int]
    function: ClassVar[Callable[..., Tensor]]
    waits = False  # for what comes behind, in training: see ``layers.training``
    asked: bool | None = None

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
        in_channels = positive(name, "in_channels", in_channels)
        depth_multiplier = positive(name, "depth_multiplier", depth_multiplier)
        _check_padding_mode(name, padding_mode)
        if not isinstance(padding, str):
            padding = as_tuple(name, "padding", padding, dims, 0)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            in_channels * depth_multiplier,
            as_tuple(name, "kernel_size", kernel_size, dims, 1),
            as_tuple(name, "stride", stride, dims, 1),
            padding,
            as_tuple(name, "dilation", dilation, dims, 1),
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    @property
    def depth_multiplier(self: Any) -> int:
        """Filters per input channel, M."""
        return int(self.out_channels // self.in_channels)

    def _conv_forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if tracing.recorded(x) or direct.pytorchs(self, x, weight):
            return super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        y = waiting(self, "depthwise", x, weight, bias) if self.waits and self.padding_mode == "zeros" else None
        return _learned(self, x, weight, bias) if y is None else y

    def alone(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = pending.value_of(x), self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return type(self).function(x, weight, bias, self.stride, padding, self.dilation)

    @classmethod
    def from_conv(cls: Any, conv: Any) -> Any:
        """The same layer as a depthwise ``nn.Conv`` (groups == in_channels), sharing its parameters.

        Raises:
            TypeError, ValueError: ``conv`` is not such a convolution.
        """
        _check_conv(cls, conv)
        if conv.groups != conv.in_channels:
            raise ValueError(
                f"{cls.__name__}.from_conv: a depthwise convolution has groups == in_channels, got groups="
                f"{conv.groups} and in_channels={conv.in_channels}"
            )
        layer = cls(
            conv.in_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.bias is not None,
            conv.padding_mode,
            "meta",
            depth_multiplier=conv.out_channels // conv.in_channels,
        )
        return _share_parameters(layer, conv)


class DepthwiseConv1d(_DepthwiseConv, nn.Conv1d):
    """Depthwise convolution of signals; see :class:`DepthwiseConv2d`.

    Shape:
        x: (N, C, L)    ->    (N, C*M, Lo)
    """

    dims = 1
    function = ops.depthwise_conv1d


class DepthwiseConv2d(_DepthwiseConv, nn.Conv2d):
    """Depthwise convolution: every channel under its own M filters, nothing added across channels.

    Equal to ``nn.Conv2d(C, C*M, kernel_size, groups=C)`` with the same state_dict.

    Args:
        in_channels: channels of the input, C.
        kernel_size, stride, padding, dilation, bias, padding_mode: as in ``nn.Conv2d``.
        depth_multiplier: filters per input channel, M.

    Shape:
        x: (N, C, H, W)    ->    (N, C*M, Ho, Wo),  Ho = (H + 2*padding - dilation*(kH-1) - 1) // stride + 1
        weight: (C*M, 1, kH, kW)    bias: (C*M,)

    Cost per image: C*M*kH*kW*Ho*Wo multiply-adds.

    Example:
        >>> import torch
        >>> DepthwiseConv2d(8, 3, padding=1, depth_multiplier=2)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])

    Reference: Sifre 2014; Howard et al. 2017, arXiv:1704.04861.
    """

    dims = 2
    function = ops.depthwise_conv2d


class DepthwiseConv3d(_DepthwiseConv, nn.Conv3d):
    """Depthwise convolution of volumes; see :class:`DepthwiseConv2d`.

    Shape:
        x: (N, C, D, H, W)    ->    (N, C*M, Do, Ho, Wo)
    """

    dims = 3
    function = ops.depthwise_conv3d


class _PointwiseConv(_Scriptable):
    """What pointwise layers of all dimensions share; stands before ``nn.Conv1d/2d/3d`` among the bases."""

    dims: ClassVar[int]
    function: ClassVar[Callable[..., Tensor]]
    waits = False
    asked: bool | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: Size = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        in_channels = positive(name, "in_channels", in_channels)
        out_channels = positive(name, "out_channels", out_channels)
        steps = as_tuple(name, "stride", stride, self.dims, 1)
        super().__init__(  # type: ignore[call-arg]
            in_channels, out_channels, 1, steps, bias=bias, device=device, dtype=dtype
        )

    def _conv_forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if tracing.recorded(x) or direct.pytorchs(self, x, weight):
            return super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        op = "pointwise" if set(self.stride) == {1} else "normal"
        y = waiting(self, op, x, weight, bias) if self.waits else None
        return _learned(self, x, weight, bias) if y is None else y

    def alone(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return type(self).function(pending.value_of(x), weight, bias, self.stride)

    @classmethod
    def from_conv(cls: Any, conv: Any) -> Any:
        """The same layer as a 1x1 ``nn.Conv`` (groups 1, no padding), sharing its parameters.

        Raises:
            TypeError, ValueError: ``conv`` is not such a convolution.
        """
        _check_conv(cls, conv)
        padded = conv.padding not in ("same", "valid") and any(conv.padding)
        if any(k != 1 for k in conv.kernel_size) or conv.groups != 1 or padded:
            raise ValueError(
                f"{cls.__name__}.from_conv: a pointwise convolution has kernel_size 1, groups 1 and padding 0, got "
                f"kernel_size={conv.kernel_size}, groups={conv.groups}, padding={conv.padding}"
            )
        has_bias = conv.bias is not None
        layer = cls(conv.in_channels, conv.out_channels, stride=conv.stride, bias=has_bias, device="meta")
        return _share_parameters(layer, conv)


class PointwiseConv1d(_PointwiseConv, nn.Conv1d):
    """Pointwise convolution of signals; see :class:`PointwiseConv2d`.

    Shape:
        x: (N, C, L)    ->    (N, O, Lo)
    """

    dims = 1
    function = ops.pointwise_conv1d


class PointwiseConv2d(_PointwiseConv, nn.Conv2d):
    """Pointwise (1x1) convolution: the same linear layer on the channel vector of every pixel.

    Equal to ``nn.Conv2d(C, O, 1)`` with the same state_dict.

    Args:
        in_channels: channels of the input, C.
        out_channels: channels of the output, O.
        stride, bias: as in ``nn.Conv2d``.

    Shape:
        x: (N, C, H, W)    ->    (N, O, Ho, Wo),  Ho = (H - 1) // stride + 1
        weight: (O, C, 1, 1)    bias: (O,)

    Cost per image: C*O*Ho*Wo multiply-adds.

    Example:
        >>> import torch
        >>> PointwiseConv2d(8, 3)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    dims = 2
    function = ops.pointwise_conv2d


class PointwiseConv3d(_PointwiseConv, nn.Conv3d):
    """Pointwise convolution of volumes; see :class:`PointwiseConv2d`.

    Shape:
        x: (N, C, D, H, W)    ->    (N, O, Do, Ho, Wo)
    """

    dims = 3
    function = ops.pointwise_conv3d
