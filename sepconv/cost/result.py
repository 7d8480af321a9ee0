"""The words of a count: one :class:`Layer` per operation, a :class:`Cost` for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One operation, each time it runs.

    ``kind`` is "normal", "depthwise", "pointwise", "grouped" or "transposed" (convolutions), "linear" (a matrix
    product with a parameter), "matmul" (without one), "norm" or "other" (parameters without multiply-adds) or
    "unused" (parameters that take no part). Shapes are without the batch. ``params`` is 0 where the same parameters
    were counted before.

    ``separable_params`` and ``separable_macs`` are those of a normal convolution made depthwise separable, with one
    filter per channel; for every other kind they repeat ``params`` and ``macs``. ``ratio`` is separable / normal in
    multiply-adds: of a normal convolution's separable form to itself, and, on the pointwise half of a depthwise and
    pointwise pair, of the pair to the normal convolution in its place.
    """

    name: str
    kind: str
    input_shape: Shape
    output_shape: Shape
    kernel_size: Shape
    stride: Shape
    params: int
    macs: int
    bytes: int
    separable_params: int
    separable_macs: int
    ratio: float | None = None


@dataclass(frozen=True)
class Cost:
    """The result of ``count``.

    ``params``: all parameters. ``buffers``: floating-point numbers kept beside them, such as running means.
    ``conv_params``: weights of the convolutions alone (no bias, no classifier). ``macs``: multiply-adds per image.
    ``bytes``: moved per image.
    """

    params: int
    buffers: int
    conv_params: int
    macs: int
    bytes: int
    layers: list[Layer]

    @property
    def separable_params(self) -> int:
        """Parameters if every normal convolution were depthwise separable."""
        return sum(layer.separable_params for layer in self.layers)

    @property
    def separable_macs(self) -> int:
        """Multiply-adds if every normal convolution were depthwise separable."""
        return sum(layer.separable_macs for layer in self.layers)

    def __str__(self) -> str:
        header = f"{'layer':28} {'kind':10} {'input':>13} {'output':>13} {'params':>11} {'MACs':>13} {'ratio':>6}"
        rows = [
            f"{layer.name:28} {layer.kind:10} {_by(layer.input_shape):>13} {_by(layer.output_shape):>13} "
            f"{layer.params:11,} {layer.macs:13,} {'' if layer.ratio is None else format(layer.ratio, '.3f'):>6}"
            for layer in self.layers
            if layer.macs
        ]
        total = f"{self.params:,} parameters ({self.conv_params:,} convolution weights), {self.macs:,} MACs"
        return "\n".join([header, *rows, f"{total}, {self.bytes:,} bytes"])


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


def separable_ratio(out_channels: int, kernel_size: int | Sequence[int], depth_multiplier: int = 1) -> float:
    """Multiply-adds of a separable convolution / those of the normal one: M * (1/O + 1/(kH*kW)).

    Weights have the same ratio. A single ``kernel_size`` is the side of a square.

    Example:
        >>> round(1 / separable_ratio(512, 3), 2)
        8.84

    Reference: Howard et al. 2017, arXiv:1704.04861, section 3.1.
    """
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if min((out_channels, depth_multiplier, *sides)) < 1:
        raise ValueError(
            "separable_ratio: out_channels, kernel_size and depth_multiplier must be positive, got "
            f"{out_channels}, {kernel_size} and {depth_multiplier}"
        )
    return depth_multiplier * (1 / out_channels + 1 / math.prod(sides))


def with_separable_form(layer: Layer) -> Layer:
    """A normal convolution (C, O, k) next to its separable form: C*(k + O) weights in place of C*O*k."""
    channels, out_channels = layer.input_shape[0], layer.output_shape[0]
    weights = channels * out_channels * math.prod(layer.kernel_size)
    separable_weights = channels * (math.prod(layer.kernel_size) + out_channels)
    params = layer.params - weights + separable_weights if layer.params >= weights else layer.params
    macs = layer.macs // weights * separable_weights
    return replace(layer, separable_params=params, separable_macs=macs, ratio=separable_weights / weights)


def closing_pair(depthwise: Layer, pointwise: Layer) -> Layer:
    """The pointwise half of a separable convolution, with the ratio of the whole to a normal convolution."""
    pixels = pointwise.macs // (pointwise.input_shape[0] * pointwise.output_shape[0])
    normal = math.prod(depthwise.kernel_size) * depthwise.input_shape[0] * pointwise.output_shape[0] * pixels
    return replace(pointwise, ratio=(depthwise.macs + pointwise.macs) / normal)
