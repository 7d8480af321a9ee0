"""One call of one operation, described: all that the choice and the making of a kernel may depend on.

A case holds sizes, steps and kinds of numbers, never numbers themselves, so that it can be compared, kept and asked
about before there is any memory. A kernel that was prepared for a case is called with tensors in this order:

    depthwise, forward        x, weight, bias
    depthwise, grad_input     grad_output, weight
    depthwise, grad_weight    grad_output, x
    pointwise                 x, weight, bias, residual
    normal                    x, weight, bias, residual
    separable                 x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual
    pool, window, resize      x
    reduce, softmax, gather   x (see ``axes``)
    shuffle                   x, residual
    elementwise, product      x, others, numbers
    row_norm, group_norm      x, weight, bias

A convolution whose weight is int8 is quantised (``reference.quantized_conv``): x is uint8, or float32 that is quantised
as it is read, bias is int32, y and residual are uint8 or float32. Scales and zero points are constants, which kernels
get with the weights, and no part of the case: weight, bias, scale, numbers; of "separable" depthwise weight, pointwise
weight, both biases, both scales, both numbers. Between its halves lies uint8.

All but convolutions read and write float32, bfloat16 and uint8, each its own. Where one of these (``Case.images``) is
uint8, a last tensor ``numbers`` (float32) has a row (scale, zero point) for each of them, (1, 0) for one that is not.

Tensors are (N, C, ...), and rows (R, C) where there is no space. A pointwise convolution of rows is a linear layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.layout import memory_format

Sizes = tuple[int, ...]
PASSES = ("forward", "grad_input", "grad_weight")
_CPU = torch.device("cpu")


class Geometry(NamedTuple):
    """How a filter walks over an image: one entry per spatial dimension, padding as (low, high) pairs."""

    stride: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes

    @classmethod
    def of_pixels(cls, dims: int) -> Geometry:
        """Pixel by pixel, as a pointwise convolution goes."""
        return cls((1,) * dims, ((0, 0),) * dims, (1,) * dims)

    def output_size(self, image: Sequence[int], kernel: Sequence[int]) -> Sizes:
        """Ho = (H + low + high - dilation*(kH-1) - 1) // stride + 1, once per spatial dimension."""
        return tuple(
            [
                (size + low + high - d * (k - 1) - 1) // s + 1
                for size, k, s, (low, high), d in zip(
                    image, kernel, self.stride, self.padding, self.dilation, strict=True
                )
            ]
        )


class Outline(NamedTuple):
    """A tensor without its memory.

    Attributes:
        plain: a value for each place in memory: not sparse, no sign that is still to be changed.
    """

    shape: Sizes
    stride: Sizes
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    plain: bool = True

    @classmethod
    def of(cls, tensor: Tensor | Outline) -> Outline:
        if isinstance(tensor, Outline):
            return tensor
        strided = tensor.layout is torch.strided
        stride = tuple(tensor.stride()) if strided else ()
        return cls(tuple(tensor.shape), stride, tensor.dtype, tensor.device, strided and not tensor.is_neg())

    @classmethod
    def contiguous_of(
        cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = _CPU
    ) -> Outline:
        return cls(tuple(shape), _steps(shape, range(len(shape) - 1, -1, -1)), dtype, device)

    @classmethod
    def dense(cls, shape: Sequence[int], like: Outline) -> Outline:
        """Without gaps, pixel by pixel in memory where ``like`` is."""
        if not like.channels_last:
            return cls.contiguous_of(shape, like.dtype, like.device)
        return cls.channels_last_of(shape, like.dtype, like.device)

    @classmethod
    def channels_last_of(
        cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = _CPU
    ) -> Outline:
        return cls(tuple(shape), _steps(shape, (1, *range(len(shape) - 1, 1, -1), 0)), dtype, device)

    def meta(self) -> Tensor:
        """A tensor of this size without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    def to(self, dtype: torch.dtype) -> Outline:
        """What ``tensor.to(dtype)`` gives."""
        return self if dtype is self.dtype else Outline.of(self.meta().to(dtype))._replace(device=self.device)

    def on(self, device: torch.device) -> Outline:
        return self._replace(device=device)

    @property
    def memory_format(self) -> torch.memory_format:
        return _memory_format(self.shape, self.stride)

    @property
    def channels_last(self) -> bool:
        return self.memory_format is not torch.contiguous_format

    @property
    def contiguous(self) -> bool:
        return _contiguous(self.shape, self.stride)

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.shape) - 2

    @property
    def elements(self) -> int:
        return prod(self.shape)


def _steps(shape: Sequence[int], order: Iterable[int]) -> Sizes:
    """Strides without gaps; ``order`` names the dimensions, the one that lies side by side in memory first."""
    steps, step = [0] * len(shape), 1
    for d in order:
        steps[d] = step
        step *= max(shape[d], 1)
    return tuple(steps)


# A case asks the same few times over.
@lru_cache(maxsize=256)
def _memory_format(shape: Sizes, stride: Sizes) -> torch.memory_format:
    return memory_format(torch.empty_strided(shape, stride, device="meta"))


@lru_cache(maxsize=256)
def _contiguous(shape: Sizes, stride: Sizes) -> bool:
    return torch.empty_strided(shape, stride, device="meta").is_contiguous()


class Window(NamedTuple):
    """What a pool makes of the pixels under each place of its window: the mean, or the maximum.

    Attributes:
        counts_padding: whether the mean counts padding as zeros; padding is left out of a maximum.
        divisor: what the mean divides by; 0: by the number of pixels.
        shares: of an adaptive pool how many results share the image along each axis; ``size`` is that of the largest.
    """

    size: Sizes
    mean: bool = False
    counts_padding: bool = False
    divisor: int = 0
    shares: Sizes = ()


NO_WEIGHT = Outline((0,), (1,))
"""Of an operation that has none."""


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
        op: "depthwise", "pointwise", "normal", "separable", or one of those above that stand between convolutions.
        y: what the convolution makes of x; in gradients the tensor whose gradient is given. The tensor that a pass
            writes lies in memory as its outline says: without gaps, channels_last where what it is made from is.
        which: the pass: "forward", "grad_input" or "grad_weight".
        then: the pointwise convolution that follows in the same pass ("separable" only); its x is this y.
        others: further tensors that are read.
        detail: what else the operation depends on: of "elementwise" the expression, of "row_norm" its kind,
            of "pool" what is taken, of "window" its size and what is taken, of "shuffle" in how many parts the
            channels come (all in x, or half of them each in x and in residual), of "resize" and "group_norm" how.
        bound: whether the result goes to given memory, of the layout of ``result``, in call after call.
    """

    op: str
    x: Outline
    weight: Outline
    y: Outline
    geometry: Geometry
    which: str = "forward"
    bias: Outline | None = None
    residual: Outline | None = None
    activation: str = ""
    then: Case | None = None
    others: tuple[Outline, ...] = ()
    detail: Hashable = None
    bound: bool = False
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def result(self) -> Outline:
        """The tensor that is written."""
        if self.which == "forward":
            return self.y if self.then is None else self.then.y
        return self.x if self.which == "grad_input" else self.weight

    @property
    def given(self) -> tuple[Outline, ...]:
        """The tensors that are read, those that there are."""
        reads = {"forward": (self.x, self.weight), "grad_input": (self.y, self.weight), "grad_weight": (self.y, self.x)}
        after = () if self.then is None else self.then.given[1:]
        found = (*reads[self.which], self.bias, self.residual, *self.others, *after)
        return tuple(outline for outline in found if outline is not None and outline != NO_WEIGHT)

    @property
    def images(self) -> tuple[Outline, ...]:
        """What is no constant: x, what is added or else read, and the result."""
        read = (self.x, self.residual, *self.others, self.result)
        return tuple(outline for outline in read if outline is not None)

    @property
    def numbers(self) -> frozenset[torch.dtype]:
        """The types of all that is read and written."""
        return frozenset(outline.dtype for outline in (*self.given, self.result))

    @property
    def kernel_size(self) -> Sizes:
        return self.weight.shape[2:]

    @property
    def groups(self) -> int:
        return self.x.shape[1] // max(1, self.weight.shape[1])

    @property
    def quantized(self) -> bool:
        """Whether it is a convolution of whole numbers."""
        return self.weight.dtype is torch.int8

    @property
    def first(self) -> Case:
        """Of a separable convolution the depthwise one alone."""
        return replace(self, op="depthwise", then=None)

    def into(self, out: Tensor | Outline) -> Case:
        """The same, with the result in given memory of this layout."""
        outline = Outline.of(out)
        if self.then is None:
            return replace(self, y=outline, bound=True)
        # What lies between, if it is kept at all, is an image of many channels.
        lay = Outline.channels_last_of if self.x.dims == 2 else Outline.contiguous_of
        hidden = lay(self.y.shape, self.y.dtype, self.y.device)
        return replace(self, y=hidden, then=replace(self.then, x=hidden).into(outline), bound=True)


Given = Tensor | Outline


def _or_none(tensor: Given | None) -> Outline | None:
    return None if tensor is None else Outline.of(tensor)


def _convolution(
    op: str,
    x: Given,
    weight: Given,
    bias: Given | None,
    residual: Given | None,
    geometry: Geometry,
    activation: str,
) -> Case:
    image, filters = Outline.of(x), Outline.of(weight)
    size = geometry.output_size(image.shape[2:], filters.shape[2:])
    y = Outline.dense((image.shape[0], filters.shape[0], *size), image)
    if filters.dtype is torch.int8:
        y = y._replace(dtype=torch.uint8)
    after, added = _or_none(bias), _or_none(residual)
    return Case(op, image, filters, y, geometry, bias=after, residual=added, activation=activation)


def depthwise(x: Given, weight: Given, bias: Given | None, geometry: Geometry, activation: str = "") -> Case:
    return _convolution("depthwise", x, weight, bias, None, geometry, activation)


def depthwise_grad_input(grad_output: Given, weight: Given, size: Sequence[int], geometry: Geometry) -> Case:
    """``size``: that of x, the result."""
    grad, filters = Outline.of(grad_output), Outline.of(weight)
    return Case("depthwise", Outline.dense(size, grad), filters, grad, geometry, "grad_input")


def depthwise_grad_weight(grad_output: Given, x: Given, size: Sequence[int], geometry: Geometry) -> Case:
    """``size``: that of the weight, the result, which is contiguous."""
    grad, image = Outline.of(grad_output), Outline.of(x)
    filters = Outline.contiguous_of(size, image.dtype, image.device)
    return Case("depthwise", image, filters, grad, geometry, "grad_weight")


def normal(
    x: Given, weight: Given, bias: Given | None, residual: Given | None, geometry: Geometry, activation: str = ""
) -> Case:
    """Any convolution; how many groups of channels it has follows from the sizes."""
    return _convolution("normal", x, weight, bias, residual, geometry, activation)


def pointwise(
    x: Given, weight: Given, bias: Given | None = None, residual: Given | None = None, activation: str = ""
) -> Case:
    image = Outline.of(x)
    return _convolution("pointwise", image, weight, bias, residual, Geometry.of_pixels(image.dims), activation)


def separable(first: Case, second: Case) -> Case:
    """A depthwise case and the pointwise one that reads its result."""
    return replace(first, op="separable", then=second)


def pool(x: Given, out: Given, what: str = "mean") -> Case:
    """The mean or the Euclidean "length" over all pixels of each channel: (N, C, H, W) -> (N, C) or (N, C, 1, 1)."""
    image = Outline.of(x)
    return Case("pool", image, NO_WEIGHT, Outline.of(out), Geometry.of_pixels(image.dims), detail=what)


def window(x: Given, out: Given, geometry: Geometry, over: Window) -> Case:
    """The mean or the maximum of every window of pixels. ``out`` says how many there are: the last may reach beyond
    the padding."""
    return Case("window", Outline.of(x), NO_WEIGHT, Outline.of(out), geometry, detail=over)


def shuffle(x: Given, other: Given | None, out: Given, parts: int) -> Case:
    """The channels of x, or of both images, in another order: the first of every part, the second of every part ..."""
    image = Outline.of(x)
    geometry = Geometry.of_pixels(image.dims)
    return Case("shuffle", image, NO_WEIGHT, Outline.of(out), geometry, residual=_or_none(other), detail=parts)


def elementwise(tensors: Sequence[Given], out: Given, expression: Hashable) -> Case:
    """``expression`` (see ``kernels.expression``) of tensors that are broadcast to the size of ``out``."""
    x, *others = map(Outline.of, tensors)
    result = Outline.of(out)
    geometry = Geometry.of_pixels(max(result.dims, 0))
    return Case("elementwise", x, NO_WEIGHT, result, geometry, others=tuple(others), detail=expression)


class RowNormDetail(NamedTuple):
    """``kind``: "layer" (mean 0, deviation 1, then weight and bias) or "length" (divided by its Euclidean length).

    ``eps`` is added to the variance; a length is at least that.
    """

    kind: str
    eps: float


def row_norm(x: Given, out: Given, kind: str, eps: float) -> Case:
    """Every row along the last dimension normalised."""
    result = Outline.of(out)
    geometry = Geometry.of_pixels(max(result.dims, 0))
    return Case("row_norm", Outline.of(x), NO_WEIGHT, result, geometry, detail=RowNormDetail(kind, eps))


class ResizeDetail(NamedTuple):
    """``mode`` and ``align_corners`` as F.interpolate has them; ``scales`` (y, x), None where the sizes say it."""

    mode: str
    align_corners: bool
    scales: tuple[float | None, float | None]


def resize(x: Given, out: Given, detail: ResizeDetail) -> Case:
    """An image (N, C, H, W) brought to another size."""
    result = Outline.of(out)
    return Case("resize", Outline.of(x), NO_WEIGHT, result, Geometry.of_pixels(2), detail=detail)


class GroupNormDetail(NamedTuple):
    """So many groups of channels, each brought to mean 0 and deviation 1; ``eps`` is added to the variance."""

    groups: int
    eps: float


def group_norm(x: Given, out: Given, detail: GroupNormDetail) -> Case:
    """An image (N, C, H, W), every group of channels normalised over all pixels."""
    result = Outline.of(out)
    return Case("group_norm", Outline.of(x), NO_WEIGHT, result, Geometry.of_pixels(max(result.dims, 0)), detail=detail)
