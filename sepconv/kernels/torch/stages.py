"""Stages in training by PyTorch's own operations, pass by pass: for all numbers, layouts and activations.

Gradients are formulas here, not autograd: what calls these functions is itself one node of its graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Geometry
from sepconv.kernels.layout import memory_format
from sepconv.kernels.prologue import (
    Deviation,
    InputGradients,
    Need,
    Prologue,
    StageGradients,
    StageOutput,
    Statistics,
)
from sepconv.kernels.torch import aten


def _wide(x: Tensor) -> Tensor:
    """In at least the 32 bits in which everything is computed."""
    return x if x.dtype is torch.float64 else x.float()


def _each(vector: Tensor, x: Tensor) -> Tensor:
    """A number for each channel, to be broadcast over pixels."""
    return vector.view(-1, *(1,) * (x.dim() - 2))


def _normal(x: Tensor, prologue: Prologue) -> tuple[Tensor, Tensor]:
    """The deviation from the mean, and the activation's argument."""
    deviation = _wide(x) - _each(prologue.mean, x)
    return deviation, deviation * _each(prologue.scale, x) + _each(prologue.bias, x)


def read(x: Tensor, prologue: Prologue | None) -> Tensor:
    """What a kernel makes of x before anything else."""
    if prologue is None:
        return x
    return ACTIVATIONS[prologue.activation].function(_normal(x, prologue)[1]).to(x.dtype)


def deviated(grad: Tensor, deviation: Deviation | None) -> Tensor:
    """The gradient of a convolution's result, with what came through its statistics."""
    if deviation is None:
        return grad
    y, mean, offset, slope = deviation
    moved = (_wide(y) - _each(mean, y)) * _each(slope, y) + _each(offset, y)
    return (moved + grad).to(grad.dtype)


def statistics(x: Tensor) -> Statistics:
    """Of the values as they are stored."""
    over = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(_wide(x), over, correction=0)
    return Statistics(mean, var)


def finish(x: Tensor, prologue: Prologue, residual: Tensor | None = None) -> Tensor:
    """What a kernel would read, as a tensor; ``residual`` is added to it."""
    if residual is None:
        return read(x, prologue)
    return (ACTIVATIONS[prologue.activation].function(_normal(x, prologue)[1]) + residual).to(x.dtype)


def finish_gradients(grad: Tensor, x: Tensor, prologue: Prologue) -> InputGradients:
    """Back through activation and norm. ``grad``: of :func:`read`'s result."""
    record = ACTIVATIONS[prologue.activation]
    deviation, argument = _normal(x, prologue)
    g = record.backward(_wide(grad), record.function(argument) if record.from_output else argument)
    over = [d for d in range(x.dim()) if d != 1]
    grad_x = (g * _each(prologue.scale, x)).to(x.dtype)
    return InputGradients(grad_x, g.sum(over), (g * deviation).sum(over))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the channels of each pixel."""
    rows = x.movedim(1, -1)
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps).movedim(-1, 1)


def layer_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> InputGradients:
    """Back through it; the sums are the gradients of bias and weight."""
    var, mean = torch.var_mean(_wide(x), 1, correction=0, keepdim=True)
    scale, wide = torch.rsqrt(var + eps), _wide(grad)
    normal = (_wide(x) - mean) * scale
    weighed = wide if weight is None else wide * _each(weight, x)
    rest = weighed - weighed.mean(1, keepdim=True) - normal * (weighed * normal).mean(1, keepdim=True)
    over = [d for d in range(x.dim()) if d != 1]
    return InputGradients((rest * scale).to(x.dtype), wide.sum(over), (wide * normal).sum(over))


def _output(y: Tensor, wanted: bool) -> StageOutput:
    return StageOutput(y, *statistics(y)) if wanted else StageOutput(y, None, None)


def convolution(
    x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool
) -> StageOutput:
    """Any convolution; how many groups of channels it has follows from the sizes. The result has the layout of x."""
    h = read(x, prologue)
    y = aten.conv(
        h, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry, groups=_groups(x, weight)
    )
    return _output(y.contiguous(memory_format=memory_format(x)), statistics)


def _groups(x: Tensor, weight: Tensor) -> int:
    return x.shape[1] // max(1, weight.shape[1])


def convolution_gradients(
    grad: Tensor,
    deviation: Deviation | None,
    x: Tensor,
    prologue: Prologue | None,
    weight: Tensor,
    geometry: Geometry,
    need: Need,
) -> StageGradients:
    """Of :func:`convolution`."""
    dz = deviated(grad, deviation)
    bias = _wide(dz).sum([d for d in range(dz.dim()) if d != 1]) if need[2] else None
    h = read(x, prologue) if need[1] else x  # the numbers are read for the weight's gradient only
    grad_h, grad_weight = aten.convolution_gradients(dz, h, weight.to(x.dtype), geometry, (need[0], need[1]))
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype).contiguous()
    if grad_h is not None:
        grad_h = grad_h.contiguous(memory_format=memory_format(x))
    if grad_h is None or prologue is None:
        return StageGradients(grad_h, None, None, grad_weight, bias)
    return StageGradients(*finish_gradients(grad_h, x, prologue), grad_weight, bias)
