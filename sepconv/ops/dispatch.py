"""Which kernel computes an operation, and why a faster one does not.

Each operation has a fast kernel (Halide, on CPUs) and PyTorch's own, which runs everywhere. The choice depends on
shapes, strides, dtype and device, never on values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels import layout
from sepconv.kernels.halide.conv import depthwise, pointwise, separable
from sepconv.kernels.torch import aten
from sepconv.ops.explain import HALF, Choice, choose, outline


def as_output(y: Tensor, x: Tensor) -> Tensor:
    """Give PyTorch's result the layout that ``layout.new_output`` promises; no copy where it has it already."""
    return y.contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    if not layout.is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def _single(tensor: Tensor) -> Tensor:
    """Filters as our kernel reads them: float32 even where the image's numbers have 16 bits."""
    return tensor.float() if tensor.dtype in HALF else tensor


def _with_single_filters(run: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    if dtype not in HALF:
        return run
    return lambda image, weight, bias=None: run(image, weight.float(), None if bias is None else bias.float())


def _rounding(run: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    return (lambda grad_output, x: run(grad_output, x).to(dtype)) if dtype in HALF else run


def _prepare_pytorch(x: Tensor, geometry: tuple[Any, Any, Any], activation: str) -> Callable[..., Tensor]:
    """PyTorch's depthwise convolution for tensors like ``x``, with all that their sizes decide decided."""
    stride, padding, dilation = geometry
    if activation or any(low != high for low, high in padding):
        return lambda x, w, b: as_output(aten.depthwise_forward(x, w, b, *geometry, activation), x)
    conv: Callable[..., Tensor] = aten.CONV[len(stride)]
    amounts, groups = [low for low, _ in padding], x.shape[1]
    form = _memory_format(x)
    in_form: bool | None = None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal in_form
        y = conv(x, weight, bias, stride, amounts, dilation, groups)
        if in_form is None:  # for these sizes and strides PyTorch's choice of a layout is always the same
            in_form = y.is_contiguous(memory_format=form)
        return y if in_form else y.contiguous(memory_format=form)

    return run


def _consider_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Choice:
    geometry, dtype = (tuple(stride), _pairs(padding), tuple(dilation)), x.dtype
    filters, added = _single(weight), None if bias is None else _single(bias)
    x_like, w_like = outline(x), outline(filters)
    case = ("forward", x, filters, *geometry, activation)
    return Choice(
        "depthwise_conv",
        depthwise.supports(*case) or depthwise.slower(*case),
        lambda: _with_single_filters(depthwise.prepare_forward(x, filters, added, *geometry, activation), dtype),
        lambda: depthwise.describe("forward", x_like(), w_like(), *geometry, activation),
        _prepare_pytorch(x, geometry, activation),
    )


def _consider_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Choice:
    size, geometry, dtype = tuple(input_size), (tuple(stride), _pairs(padding), tuple(dilation)), grad_output.dtype
    filters = _single(weight)
    g_like, w_like = outline(grad_output), outline(filters)
    by_pytorch, form = aten.prepare_grad_input(size, *geometry), _memory_format(grad_output)
    case = ("grad_input", grad_output, filters, *geometry)
    return Choice(
        "depthwise_conv_grad_input",
        depthwise.supports(*case) or depthwise.slower(*case, size=size),
        lambda: _with_single_filters(depthwise.prepare_grad_input(grad_output, filters, size, *geometry), dtype),
        lambda: depthwise.describe("grad_input", g_like(), w_like(), *geometry, size=size),
        lambda g, w: by_pytorch(g, w).contiguous(memory_format=form),
    )


def _consider_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Choice:
    size, geometry, dtype = tuple(weight_size), (tuple(stride), _pairs(padding), tuple(dilation)), x.dtype
    g_like, x_like = outline(grad_output), outline(x)
    by_pytorch = aten.prepare_grad_weight(size, x.shape[1], *geometry)
    case = ("grad_weight", grad_output, x, *geometry)
    return Choice(
        "depthwise_conv_grad_weight",
        depthwise.supports(*case) or depthwise.slower(*case, size=size),
        lambda: _rounding(depthwise.prepare_grad_weight(grad_output, x, size, *geometry), dtype),
        lambda: depthwise.describe("grad_weight", g_like(), x_like(), *geometry, size=size),
        lambda g, x: by_pytorch(g, x).contiguous(),
    )


def _consider_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Choice:
    arguments = (x, weight, bias, activation, residual)
    x_like, w_like, b_like, r_like = map(outline, (x, weight, bias, residual))
    return Choice(
        "pointwise_conv",
        pointwise.supports(*arguments) or pointwise.slower(*arguments),
        lambda: pointwise.Prepared(x, weight, activation, residual is not None),
        lambda: pointwise.describe(x_like(), w_like(), b_like(), activation, r_like()),
        lambda x, w, b, r: as_output(aten.pointwise_forward(x, w, b, activation, r), x),
    )


def _consider_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    between: str,
    activation: str,
) -> Choice:
    """One pipeline where there is one, else the two operations one after the other, each with its own choice."""
    flat = (tuple(stride), tuple(padding), tuple(dilation))
    geometry = (flat[0], _pairs(padding), flat[2])

    def separately(x: Tensor, dw: Tensor, pw: Tensor, dw_bias: Any, pw_bias: Any, residual: Any) -> Tensor:
        hidden = depthwise_forward(x, dw, dw_bias, *flat, between)
        return pointwise_forward(hidden, pw, pw_bias, residual, activation)

    def arguments(x: Any, dw: Any, pw: Any, dw_bias: Any, pw_bias: Any, residual: Any) -> tuple[Any, ...]:
        return x, dw, dw_bias, between, pw, pw_bias, activation, *geometry, residual

    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    given, outlines = arguments(*tensors), [outline(tensor) for tensor in tensors]
    case = (x, depthwise_weight, between, pointwise_weight, activation, *geometry, residual is not None)
    return Choice(
        "separable_conv",
        separable.supports(*given) or separable.slower(depthwise_weight.shape[2:]),
        lambda: separable.Prepared(separable.plan_for(*case), x, depthwise_weight, pointwise_weight),
        lambda: separable.describe(*arguments(*(outline() for outline in outlines))),
        separately,
        "depthwise, then pointwise",
    )


def depthwise_choice(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Choice:
    """``options`` here and below: what follows the tensors in the operator's schema (see ``operators``)."""
    return choose(_consider_forward, (x, weight, bias), *options)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return depthwise_choice(x, weight, bias, *options)(x, weight, bias)


def depthwise_grad_input(grad_output: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return choose(_consider_grad_input, (grad_output, weight), *options)(grad_output, weight)


def depthwise_grad_weight(grad_output: Tensor, x: Tensor, *options: Any) -> Tensor:
    return choose(_consider_grad_weight, (grad_output, x), *options)(grad_output, x)


def pointwise_choice(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Choice:
    return choose(_consider_pointwise, (x, weight, bias, residual), activation)


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    return pointwise_choice(x, weight, bias, residual, activation)(x, weight, bias, residual)


def separable_choice(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    *options: Any,
) -> Choice:
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    return choose(_consider_separable, tensors, *options)


def separable_forward(x: Tensor, *weights_and_options: Any) -> Tensor:
    return separable_choice(x, *weights_and_options)(x, *weights_and_options[:5])
