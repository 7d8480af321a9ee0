"""The stages of a layer computed with as few kernels as there are, where that is the same as calling the modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sepconv import ops
from sepconv.activations import name_of
from sepconv.layers import folding
from sepconv.layers.conv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    DepthwiseConv3d,
    PointwiseConv1d,
    PointwiseConv2d,
    PointwiseConv3d,
)
from sepconv.layers.stage import Stage
from sepconv.ops import tracing

_DEPTHWISE: dict[type, Any] = {
    DepthwiseConv1d: ops.depthwise_conv1d,
    DepthwiseConv2d: ops.depthwise_conv2d,
    DepthwiseConv3d: ops.depthwise_conv3d,
}
_POINTWISE: dict[type, Any] = {
    PointwiseConv1d: ops.pointwise_conv1d,
    PointwiseConv2d: ops.pointwise_conv2d,
    PointwiseConv3d: ops.pointwise_conv3d,
}
_SEPARABLE: dict[tuple[type, type], Any] = {
    (DepthwiseConv1d, PointwiseConv1d): ops.separable_conv1d,
    (DepthwiseConv2d, PointwiseConv2d): ops.separable_conv2d,
    (DepthwiseConv3d, PointwiseConv3d): ops.separable_conv3d,
}


def at_once(x: Tensor, stages: Sequence[Stage], around: Iterable[nn.Module] = ()) -> Tensor | None:
    """All stages with as few kernels as there are; None where that would not be the same as calling the modules.

    It would not with a norm that does more than scale and shift, an unknown activation, another padding, or where
    somebody watches or records the parts or the modules ``around`` them.
    """
    if tracing.recorded(x) or not all([_is_known(stage) for stage in stages]):
        return None
    if len({stage.conv.dims for stage in stages}) != 1:
        return None
    if folding.watched([*around, *[module for stage in stages for module in stage]]):
        return None
    weights = folding.folded(x, stages)
    return None if weights is None else _compute(x, stages, weights)


def _is_known(stage: Stage) -> bool:
    conv, kind = stage.conv, type(stage.conv)
    if kind in _DEPTHWISE:
        return conv.padding_mode == "zeros" and name_of(stage.activation) is not None
    return kind in _POINTWISE and set(conv.stride) == {1} and name_of(stage.activation) is not None


def _compute(x: Tensor, stages: Sequence[Stage], weights: Sequence[folding.Folded]) -> Tensor:
    """A depthwise stage together with the pointwise one behind it, the others alone."""
    waiting: tuple[Stage, folding.Folded] | None = None
    for stage, (weight, bias) in zip(stages, weights, strict=True):
        conv, name = stage.conv, name_of(stage.activation) or None
        if type(conv) in _DEPTHWISE:
            x = x if waiting is None else _filter(x, *waiting)
            waiting = stage, (weight, bias)
        elif waiting is None:
            x = _POINTWISE[type(conv)](x, weight, bias, activation=name)
        else:
            (first, _, between), (dw, dw_bias) = waiting
            waiting, function = None, _SEPARABLE[type(first), type(conv)]
            x = function(
                x, dw, weight, dw_bias, bias, first.stride, first.padding, first.dilation,
                depthwise_activation=name_of(between) or None, activation=name,
            )  # fmt: skip
    return x if waiting is None else _filter(x, *waiting)


def _filter(x: Tensor, stage: Stage, folded: folding.Folded) -> Tensor:
    conv, name = stage.conv, name_of(stage.activation) or None
    y: Tensor = _DEPTHWISE[type(conv)](x, *folded, conv.stride, conv.padding, conv.dilation, activation=name)
    return y
