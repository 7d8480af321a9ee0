"""PyTorch's kernels made ready for a case: the last in every list of backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Case, GroupNormDetail, ResizeDetail, RowNormDetail, Window
from sepconv.kernels.expression import Expression
from sepconv.kernels.torch import aten, numbers


def depthwise(case: Case) -> Callable[..., Tensor]:
    form = (case.y if case.which == "grad_input" else case.x).memory_format
    if case.which == "grad_input":
        grad_input = aten.prepare_grad_input(case.x.shape, case.geometry)
        return lambda grad, weight: grad_input(grad, weight).contiguous(memory_format=form)
    if case.which == "grad_weight":
        grad_weight = aten.prepare_grad_weight(case.weight.shape, case.x.shape[1], case.geometry)
        return lambda grad, x: grad_weight(grad, x).contiguous()
    if case.activation or any(low != high for low, high in case.geometry.padding):
        return _asymmetric(case, form)
    return _plain(case, form)


def _asymmetric(case: Case, form: torch.memory_format) -> Callable[..., Tensor]:
    geometry, activation = case.geometry, case.activation

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aten.depthwise_forward(x, weight, bias, geometry, activation).contiguous(memory_format=form)

    return run


def _plain(case: Case, form: torch.memory_format) -> Callable[..., Tensor]:
    """One operation of PyTorch's, with all that sizes decide decided."""
    stride, padding, dilation = case.geometry
    conv: Callable[..., Tensor] = aten.CONV[len(stride)]
    amounts, groups = [low for low, _ in padding], case.x.shape[1]
    in_form: bool | None = None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal in_form
        y = conv(x, weight, bias, stride, amounts, dilation, groups)
        if in_form is None:  # for these sizes and strides PyTorch's choice of a layout is always the same
            in_form = y.is_contiguous(memory_format=form)
        return y if in_form else y.contiguous(memory_format=form)

    return run


def pointwise(case: Case) -> Callable[..., Tensor]:
    if case.x.dims == 0:
        return normal(case)
    form, activation = case.x.memory_format, case.activation
    forward = aten.pointwise_bf16 if case.x.dtype is torch.bfloat16 else aten.pointwise_forward

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return forward(x, weight, bias, activation, residual).contiguous(memory_format=form)

    return run


def normal(case: Case) -> Callable[..., Tensor]:
    form, geometry, groups = case.x.memory_format, case.geometry, case.groups
    activation = ACTIVATIONS[case.activation].function

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        if geometry.stride:
            y = aten.conv(x, weight, bias, geometry, groups=groups)
        else:
            y = torch.nn.functional.linear(x, weight, bias)
        return activation(y if residual is None else y + residual).contiguous(memory_format=form)

    return run


def separable(case: Case) -> Callable[..., Tensor]:
    assert case.then is not None
    first, second = depthwise(case.first), pointwise(case.then)

    def run(
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        depthwise_bias: Tensor | None,
        pointwise_bias: Tensor | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return second(first(x, depthwise_weight, depthwise_bias), pointwise_weight, pointwise_bias, residual)

    return run


_CONVERTED = (torch.bfloat16, torch.uint8)


def in_float32(case: Case, run: Callable[..., Tensor], moves: bool = False) -> Callable[..., Tensor]:
    """``run``, where images have 16 or 8 bits of their values in float32.

    ``moves``: of numbers that are all of one kind and count the same steps it takes those that are stored.
    """
    kinds = [image.dtype for image in case.images]
    if not any(kind in _CONVERTED for kind in kinds):
        return run
    counted, read, result = torch.uint8 in kinds, len(kinds) - 1, kinds[-1]

    def converted(*tensors: Tensor) -> Tensor:
        table = tensors[-1] if counted else None
        rest = tensors[read:-1] if counted else tensors[read:]
        if moves and len(set(kinds)) == 1 and (table is None or bool((table == table[0]).all())):
            return run(*tensors[:read], *rest)
        steps = [None] * len(kinds) if table is None else list(table)
        values = [numbers.read(tensor, steps[i]) for i, tensor in enumerate(tensors[:read])]
        return numbers.write(run(*values, *rest), result, steps[-1])

    return converted


def pool(case: Case) -> Callable[..., Tensor]:
    keepdim = len(case.y.shape) > 2
    dims = list(range(2, len(case.x.shape)))

    def run(x: Tensor) -> Tensor:
        if case.detail == "length":
            return torch.linalg.vector_norm(x, dim=dims, keepdim=keepdim)
        return x.mean(dims, keepdim=keepdim)

    return in_float32(case, run)


def elementwise(case: Case) -> Callable[..., Tensor]:
    expression = case.detail
    assert isinstance(expression, Expression)
    return in_float32(case, lambda *tensors: expression.of(tensors[:-1], tensors[-1]))


def row_norm(case: Case) -> Callable[..., Tensor]:
    detail, length = case.detail, case.x.shape[-1]
    assert isinstance(detail, RowNormDetail)
    if detail.kind == "layer":
        return in_float32(case, lambda x, weight, bias: F.layer_norm(x, (length,), weight, bias, detail.eps))
    return in_float32(case, lambda x, weight, bias: F.normalize(x, dim=-1, eps=detail.eps))


def resize(case: Case) -> Callable[..., Tensor]:
    detail = case.detail
    assert isinstance(detail, ResizeDetail)
    nearest = detail.mode in ("nearest", "nearest-exact")
    return in_float32(case, lambda x: aten.resize(x, case.result.shape[2:], detail), moves=nearest)


def group_norm(case: Case) -> Callable[..., Tensor]:
    detail = case.detail
    assert isinstance(detail, GroupNormDetail)
    return in_float32(case, lambda x, weight, bias: F.group_norm(x, detail.groups, weight, bias, detail.eps))


def window(case: Case) -> Callable[..., Tensor]:
    over, geometry = case.detail, case.geometry
    assert isinstance(over, Window)
    ceil = case.y.shape[2:] != geometry.output_size(case.x.shape[2:], over.size)
    return in_float32(case, lambda x: aten.window(x, over, geometry, ceil))


def shuffle(case: Case) -> Callable[..., Tensor]:
    parts = case.detail
    assert isinstance(parts, int)
    return in_float32(case, lambda x, other=None: aten.shuffle(x, other, parts), moves=True)
