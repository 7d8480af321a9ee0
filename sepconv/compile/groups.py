"""What a captured graph is rewritten to: convolutions with all that is computed in the same pass.

A group stands in the graph as the function of a node. Calling it computes it with PyTorch, so that a group whose kernel
cannot be built still runs, and a rewritten graph can be checked with no kernel at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.activations import ACTIVATIONS
from sepconv.compile.constants import Constant, name_of
from sepconv.kernels.torch import aten

Pairs = tuple[tuple[int, int], ...]
Numbers = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Convolution:
    """``activation(convolution(x) + bias + residual)``; a matrix product of rows (R, C) where there is no space.

    Attributes:
        weight: (O, C / groups, ...), batch norms and factors folded into it.
        padding: (low, high) per spatial dimension.
        residual: whether a second input is added.
        fused: what became part of it, in order: "norm", "scale", "pad", "add" and names of activations.
    """

    weight: Constant
    bias: Constant | None
    stride: Numbers
    padding: Pairs
    dilation: Numbers
    groups: int = 1
    activation: str = ""
    residual: bool = False
    fused: tuple[str, ...] = ()

    @property
    def dims(self) -> int:
        return len(self.weight.shape) - 2

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> Numbers:
        return tuple(self.weight.shape[2:])

    @property
    def kind(self) -> str:
        """ "linear", "depthwise", "pointwise", "normal" or "grouped"."""
        if self.dims == 0:
            return "linear"
        if self.groups == self.in_channels and self.groups > 1:
            return "depthwise"
        if self.groups > 1:
            return "grouped"
        plain = all(low == high == 0 for low, high in self.padding) and set(self.stride) <= {1}
        return "pointwise" if math.prod(self.kernel_size) == 1 and plain else "normal"

    @property
    def name(self) -> str:
        """The module's name in the model."""
        return name_of(self.weight.key).removesuffix(".weight")

    def macs(self, output: Numbers) -> int:
        """Multiply-adds for an output of that shape, batch included."""
        return math.prod(output) * math.prod(self.weight.shape[1:])

    def then(self, what: str, **changes: object) -> Convolution:
        """The same with something more fused into it."""
        return replace(self, fused=(*self.fused, what), **changes)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.tensor
        if self.dims == 0:
            y = F.linear(x, self.weight.tensor, bias)
        else:
            y = aten.conv(x, self.weight.tensor, bias, self.stride, self.padding, self.dilation, groups=self.groups)
        return ACTIVATIONS[self.activation].function(y if residual is None else y + residual)


@dataclass(frozen=True, eq=False)
class Separable:
    """A depthwise convolution and the pointwise one that reads it, and nothing else does."""

    depthwise: Convolution
    pointwise: Convolution

    @property
    def kind(self) -> str:
        return "separable"

    @property
    def residual(self) -> bool:
        return self.pointwise.residual

    @property
    def fused(self) -> tuple[str, ...]:
        return (*self.depthwise.fused, "pointwise", *self.pointwise.fused)

    @property
    def name(self) -> str:
        first, second = self.depthwise.name, self.pointwise.name
        return f"{first} + {second}" if second else first

    def macs(self, output: Numbers) -> int:
        hidden = (output[0], self.depthwise.out_channels, *output[2:])
        return self.depthwise.macs(hidden) + self.pointwise.macs(output)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.pointwise(self.depthwise(x), residual)


@dataclass(frozen=True, eq=False)
class Pool:
    """The mean over all pixels: (N, C, H, W) -> (N, C), or (N, C, 1, 1) if ``keepdim``."""

    keepdim: bool

    kind = "pool"
    name = ""
    fused: tuple[str, ...] = ()

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mean(x, [2, 3], keepdim=self.keepdim)


Group = Convolution | Separable | Pool
