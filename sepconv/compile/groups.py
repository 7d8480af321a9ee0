"""What a captured graph is rewritten to: convolutions with all that is computed in the same pass.

A group stands in the graph as the function of a node. Calling it computes it with PyTorch, so that a group whose kernel
cannot be built still runs, and a rewritten graph can be checked with no kernel at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.activations import ACTIVATIONS
from sepconv.compile.axes import Gathered, MatrixProduct, Reduced, Softmaxed
from sepconv.compile.numbers import NumberType
from sepconv.compile.store import Constant, name_of
from sepconv.kernels.case import Geometry, GroupNormDetail, ResizeDetail, RowNormDetail, Window
from sepconv.kernels.expression import Expression
from sepconv.kernels.torch import aten

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums of a group before they are written: ``activation(sums + bias + residual)``.

    ``residual``: whether a second input is added.
    """

    bias: Constant | None = None
    residual: bool = False
    activation: str = ""

    @property
    def is_linear(self) -> bool:
        """Whether a factor or a sum behind it can still be folded into weights and bias."""
        return not self.activation and not self.residual

    def __call__(self, biased: Tensor, residual: Tensor | None) -> Tensor:
        """By PyTorch, whose convolutions have added the bias already."""
        return ACTIVATIONS[self.activation].function(biased if residual is None else biased + residual)


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of images; a matrix product of rows (R, C) where there is no space.

    Attributes:
        weight: (O, C / groups, ...), batch norms and factors folded into it.
        fused: what became part of it, in order: "norm", "scale", "pad", "add" and names of activations.
        reads: to which numbers the model rounds the image, where that is part of it.
    """

    weight: Constant
    epilogue: Epilogue
    geometry: Geometry
    groups: int = 1
    fused: tuple[str, ...] = ()
    reads: NumberType | None = None

    @property
    def constants(self) -> tuple[Constant | None, ...]:
        """Weights and biases in the order in which kernels take them."""
        return self.weight, self.epilogue.bias

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
        padding, stride = self.geometry.padding, self.geometry.stride
        plain = all(low == high == 0 for low, high in padding) and set(stride) <= {1}
        return "pointwise" if math.prod(self.kernel_size) == 1 and plain else "normal"

    @property
    def name(self) -> str:
        """The module's name in the model."""
        return name_of(self.weight.key).removesuffix(".weight")

    def macs(self, output: Numbers) -> int:
        """Multiply-adds for an output of that shape, batch included."""
        return math.prod(output) * math.prod(self.weight.shape[1:])

    def padded(self, padding: Sequence[tuple[int, int]]) -> Convolution:
        """The same with other padding, which was an operation of its own."""
        return replace(self, geometry=self.geometry._replace(padding=tuple(padding)), fused=(*self.fused, "pad"))

    def then(self, what: str, weight: Constant, bias: Constant | None) -> Convolution:
        """The same with something folded into its weights."""
        folded = replace(self.epilogue, bias=bias)
        return replace(self, weight=weight, epilogue=folded, fused=(*self.fused, what))

    def activated(self, activation: str) -> Convolution:
        ended = replace(self.epilogue, activation=activation)
        return replace(self, epilogue=ended, fused=(*self.fused, activation))

    def with_residual(self) -> Convolution:
        return replace(self, epilogue=replace(self.epilogue, residual=True), fused=(*self.fused, "add"))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bias = None if self.epilogue.bias is None else self.epilogue.bias.tensor
        x = x if self.reads is None else self.reads.rounded(x)
        if self.dims == 0:
            y = F.linear(x, self.weight.tensor, bias)
        else:
            y = aten.conv(x, self.weight.tensor, bias, self.geometry, groups=self.groups)
        return self.epilogue(y, residual)


@dataclass(frozen=True, eq=False)
class SeparableGroup:
    """A depthwise convolution and the pointwise one that reads it, and nothing else does.

    ``between``: the numbers in which the model keeps what lies between them; None where it computes on.
    """

    depthwise: Convolution
    pointwise: Convolution
    between: NumberType | None = None

    @property
    def kind(self) -> str:
        return "separable"

    @property
    def constants(self) -> tuple[Constant | None, ...]:
        """Weights and biases in the order in which kernels take them."""
        first, second = self.depthwise, self.pointwise
        return first.weight, second.weight, first.epilogue.bias, second.epilogue.bias

    @property
    def epilogue(self) -> Epilogue:
        return self.pointwise.epilogue

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
        hidden = self.depthwise(x)
        if self.between is not None:
            hidden = self.between.rounded(hidden)
        return self.pointwise(hidden, residual)


@dataclass(frozen=True, eq=False)
class Pool:
    """The mean or the "length" over all pixels: (N, C, H, W) -> (N, C), or (N, C, 1, 1) if ``keepdim``."""

    keepdim: bool
    what: str = "mean"

    kind: ClassVar[str] = "pool"
    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        take = torch.mean if self.what == "mean" else torch.linalg.vector_norm
        return take(x, dim=[2, 3], keepdim=self.keepdim)


@dataclass(frozen=True, eq=False)
class WindowPool:
    """The maximum or the mean of every window of pixels. ``ceil``: the last one may reach beyond the padding."""

    window: Window
    geometry: Geometry
    ceil: bool = False

    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    @property
    def kind(self) -> str:
        """ "avg_pool" or "max_pool"."""
        return "avg_pool" if self.window.mean else "max_pool"

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return aten.window(x, self.window, self.geometry, self.ceil)


@dataclass(frozen=True, eq=False)
class Shuffle:
    """The channels of an image, or of two in turn, in another order: the first of every part, the second of every
    part and so on."""

    parts: int

    kind: ClassVar[str] = "shuffle"
    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return aten.shuffle(x, other, self.parts)


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Operations number by number on tensors that are broadcast to one size; ``numbers``: its constants in a row."""

    expression: Expression
    numbers: Constant

    name: ClassVar[str] = ""

    @property
    def kind(self) -> str:
        """ "elementwise", or "convert" where nothing but the kind of numbers changes."""
        return "convert" if self.is_conversion else "elementwise"

    @property
    def is_conversion(self) -> bool:
        return not self.expression.terms

    @property
    def fused(self) -> tuple[str, ...]:
        return tuple(term.operation for term in self.expression.terms)

    @property
    def constants(self) -> tuple[Constant | None, ...]:
        return (self.numbers,)

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.expression.of(tensors, self.numbers.tensor)


@dataclass(frozen=True, eq=False)
class RowNorm:
    """Rows along the last dimension normalised, see ``case.RowNormDetail``: LayerNorm of pixels, unit vectors."""

    detail: RowNormDetail
    weight: Constant | None = None
    bias: Constant | None = None

    kind: ClassVar[str] = "row_norm"
    fused: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return "" if self.weight is None else name_of(self.weight.key).removesuffix(".weight")

    @property
    def constants(self) -> tuple[Constant | None, ...]:
        return self.weight, self.bias

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.detail.kind == "length":
            return F.normalize(x, dim=-1, eps=self.detail.eps)
        weight, bias = (None if known is None else known.tensor for known in self.constants)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.detail.eps)


@dataclass(frozen=True, eq=False)
class Resize:
    """An image brought to another size, as F.interpolate does."""

    size: Numbers
    detail: ResizeDetail

    kind: ClassVar[str] = "resize"
    name: ClassVar[str] = ""
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    @property
    def fused(self) -> tuple[str, ...]:
        return (self.detail.mode,)

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return aten.resize(x, self.size, self.detail)


@dataclass(frozen=True, eq=False)
class GroupNormed:
    """An image, every group of its channels brought to mean 0 and deviation 1, then a factor and a shift a channel."""

    detail: GroupNormDetail
    weight: Constant
    bias: Constant

    kind: ClassVar[str] = "group_norm"
    fused: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return name_of(self.weight.key).removesuffix(".weight")

    @property
    def constants(self) -> tuple[Constant | None, ...]:
        return self.weight, self.bias

    def macs(self, output: Numbers) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.detail.groups, self.weight.tensor, self.bias.tensor, self.detail.eps)


AlongAxes = Reduced | Softmaxed | Gathered | MatrixProduct
ComputedGroup = (
    Convolution
    | SeparableGroup
    | Pool
    | WindowPool
    | Shuffle
    | Elementwise
    | RowNorm
    | GroupNormed
    | Resize
    | AlongAxes
)


def conversion() -> Elementwise:
    """The same values in other numbers."""
    return Elementwise(Expression(1, 0, ()), _NO_NUMBERS)


_NO_NUMBERS = Constant(torch.zeros(0), ("numbers",))


def rounds_inside(group: ComputedGroup) -> bool:
    """Whether it rounds values that it computes with, so that a kernel must do so too."""
    return (
        isinstance(group, SeparableGroup | Convolution)
        and (group.between if isinstance(group, SeparableGroup) else group.reads) is not None
    )


def keeps_numbers(group: ComputedGroup) -> bool:
    """Whether every number of the result is one of those that are read."""
    if isinstance(group, WindowPool):
        return not group.window.mean
    if isinstance(group, Reduced | Gathered):
        return group.chooses
    return isinstance(group, Shuffle) or (isinstance(group, Resize) and group.detail.mode.startswith("nearest"))


def writes_channels(target: object) -> bool:
    """Whether a group reads and writes some of the channels of a larger image in place."""
    whole = isinstance(target, (SeparableGroup, WindowPool, Shuffle, Elementwise, GroupNormed, Resize))
    return whole or (isinstance(target, Convolution) and target.dims == 2)
