"""Stages of a network in training as nodes of autograd's graph: a convolution that reads what a norm has yet to do.

A stage takes an image x, the statistics and parameters of the norm over it (:class:`Before`), a weight and a bias. Its
results are the convolution of ``act(norm(x))`` and, where the norm behind it needs them, mean and variance of each
channel: differentiable as all else, so that the gradient through a norm's statistics goes where it belongs. With
gradients of gradients, or while a transformation looks through an operation, the way back is made of PyTorch's
operators (:func:`composed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels import stages as kernels
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.training import pointwise
from sepconv.kernels.prologue import Deviation, Prologue, StageGradients, StageOutput
from sepconv.kernels.torch import aten
from sepconv.ops import tracing
from sepconv.ops.autograd import laid_out_as


class Before(NamedTuple):
    """The norm over an image and the activation behind it, both still to be done.

    ``mean``, ``var`` (biased), ``weight`` and ``bias`` have a number for each channel; without mean and variance there
    is an activation alone.
    """

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str = ""

    @classmethod
    def of(cls, tensors: Sequence[Any], eps: float, activation: str) -> Before | None:
        """From its four tensors; None where there is neither norm nor activation."""
        mean, var, weight, bias = tensors
        return None if mean is None and not activation else cls(mean, var, weight, bias, eps, activation)

    @classmethod
    def alone(cls, activation: str) -> Before:
        """No norm."""
        return cls(None, None, None, None, 0.0, activation)


class StageConvolution(NamedTuple):
    """Which convolution: "depthwise", "pointwise" or "normal", and how its filter walks."""

    op: str
    geometry: Geometry

    def forward(
        self, x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None, statistics: bool
    ) -> StageOutput:
        if self.op == "pointwise":
            return kernels.pointwise_stage(x, prologue, weight, bias, statistics)
        run = kernels.depthwise_stage if self.op == "depthwise" else kernels.normal_stage
        return run(x, prologue, weight, bias, self.geometry, statistics)

    def gradients(
        self,
        grad: Tensor,
        deviation: Deviation | None,
        x: Tensor,
        prologue: Prologue | None,
        weight: Tensor,
        need: tuple[bool, bool, bool],
    ) -> StageGradients:
        if self.op == "pointwise":
            return kernels.pointwise_stage_gradients(grad, deviation, x, prologue, weight, need)
        depthwise = self.op == "depthwise"
        run = kernels.depthwise_stage_gradients if depthwise else kernels.normal_stage_gradients
        return run(grad, deviation, x, prologue, weight, self.geometry, need)


def _each(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (x.dim() - 2))


def composed(x: Tensor, before: Before | None, residual: Tensor | None = None) -> Tensor:
    """``act(norm(x)) + residual`` by PyTorch's operators, with a derivative of every order."""
    if before is not None:
        x = ACTIVATIONS[before.activation].function(_composed_norm(x, before)).to(x.dtype)
    return x if residual is None else x + residual


def _composed_norm(x: Tensor, before: Before) -> Tensor:
    if before.mean is None or before.var is None:
        return x
    scale = torch.rsqrt(before.var + before.eps)
    scale = scale if before.weight is None else scale * before.weight
    h = (x - _each(before.mean, x)) * _each(scale, x)
    return h if before.bias is None else h + _each(before.bias, x)


def composed_convolution(
    how: StageConvolution, x: Tensor, before: Before | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The convolution of :func:`composed`, likewise."""
    h = composed(x, before)
    bias = None if bias is None else bias.to(h.dtype)
    return aten.conv(h, weight.to(h.dtype), bias, how.geometry, groups=x.shape[1] // weight.shape[1])


def _composed_stage(
    how: StageConvolution, x: Tensor, before: Before | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y = composed_convolution(how, x, before, weight, bias)
    wide = y if y.dtype is torch.float64 else y.float()
    return y, wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)


def composed_gradients(
    compose: Callable[..., Sequence[Tensor]], grads: Sequence[Tensor | None], given: Sequence[Tensor | None], need: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of ``compose(*given)``: of those that are needed, recorded where gradients are."""
    with torch.enable_grad():
        # Under other names: one tensor may have been made of another, a way back that is not ours to go.
        named = [None if t is None else t.view_as(t) for t in given]
        results = compose(*named)
    there = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [t for t, needed in zip(named, need, strict=True) if needed and t is not None]
    outputs, weights = zip(*there, strict=True)
    found = torch.autograd.grad(
        outputs, wanted, weights, create_graph=torch.is_grad_enabled(), allow_unused=True, materialize_grads=True
    )
    each = iter(found)
    return tuple([next(each) if needed and t is not None else None for t, needed in zip(named, need, strict=True)])


def _by_pytorch(grads: Sequence[Tensor | None]) -> bool:
    """Whether somebody looks through the way back."""
    return torch.is_grad_enabled() or tracing.transformed(*grads)


@lru_cache(maxsize=256)
def number(value: float) -> Tensor:
    """As a tensor: an operation with a number makes one each time, in more time than it takes for small vectors."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


class _Norm(NamedTuple):
    """A norm made ready for kernels, and what its own gradients need; ``deviation`` is None where there is no norm."""

    prologue: Prologue
    deviation: Tensor | None

    @classmethod
    def of(cls, before: Before, channels: int) -> _Norm:
        if before.mean is None or before.var is None:
            return cls(Prologue.alone(before.activation, channels), None)
        deviation = (before.var + number(before.eps)).rsqrt_()
        scale = deviation if before.weight is None else deviation * before.weight
        bias = torch.zeros_like(before.mean) if before.bias is None else before.bias
        return cls(Prologue(before.mean, scale, bias, before.activation), deviation)

    def gradients(self, total: Tensor, weighed: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
        """Of mean, var, weight and bias, from the sums that come out of the image's gradient.

        ``total`` is the sum of the gradient in front of the activation, ``weighed`` that times ``x - mean``.
        """
        scale, deviation = self.prologue.scale, self.deviation
        if deviation is None:
            return [None] * 4
        of_weight = weighed * deviation
        return [
            (scale * total).neg_() if need[0] else None,
            (scale * of_weight).mul_(deviation).mul_(number(-0.5)) if need[1] else None,
            of_weight if need[2] else None,
            total if need[3] else None,
        ]


class _Stage(torch.autograd.Function):
    """Takes which convolution, whether statistics are wanted, eps and activation of the norm, then all tensors."""

    @staticmethod
    def forward(
        ctx: Any, how: StageConvolution, statistics: bool, rest: tuple[float, str], x: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        *norm, weight, bias = tensors
        before = Before.of(norm, *rest)
        ready = None if before is None else _Norm.of(before, x.shape[1])
        y, mean, var = how.forward(x, None if ready is None else ready.prologue, weight, bias, statistics)
        ctx.how, ctx.rest, ctx.ready = how, rest, ready
        ctx.save_for_backward(x, *norm, weight, bias, *((y, mean) if statistics else (None, None)))
        ctx.set_materialize_grads(False)
        if mean is None or var is None:
            return (y,)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *given, y, mean = ctx.saved_tensors
        x, weight = given[0], given[-2]
        grad, need = grads[0], ctx.needs_input_grad[3:]
        if grad is None and all(other is None for other in grads):
            return (None,) * (3 + len(given))
        if _by_pytorch(grads):
            return None, None, None, *_stage_by_pytorch(ctx, grads, given)
        deviation = None
        if y is not None and (grads[1] is not None or grads[2] is not None):
            deviation = _deviation(y, mean, grads[1], grads[2])
        if grad is None:
            grad = torch.zeros_like(y)
        ready: _Norm | None = ctx.ready
        prologue = None if ready is None else ready.prologue
        wanted = any(need[:5]), need[5], need[6]
        found = ctx.how.gradients(grad, deviation, x, prologue, weight, wanted)
        of_norm: list[Tensor | None] = [None] * 4
        if ready is not None and found.sum is not None:
            of_norm = ready.gradients(found.sum, found.deviation, need[1:5])
        of_weight = None if found.weight is None else laid_out_as(weight, found.weight)
        return None, None, None, found.x, *of_norm, of_weight, found.bias


def _deviation(y: Tensor, mean: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None) -> Deviation:
    share = y.shape[1] / y.numel()
    offset = torch.zeros_like(mean) if grad_mean is None else grad_mean * number(share)
    slope = torch.zeros_like(mean) if grad_var is None else grad_var * number(2 * share)
    return Deviation(y, mean, offset, slope)


def _stage_by_pytorch(
    ctx: Any, grads: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    how, rest = ctx.how, ctx.rest

    def compose(x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        *norm, weight, bias = tensors
        before = Before.of(norm, *rest)
        return _composed_stage(how, x, before, weight, bias)[: len(grads)]

    return composed_gradients(compose, grads, given, ctx.needs_input_grad[3:])


_stage: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Stage).apply
"""Without what PyTorch asks for the sake of ``torch.func``, which never gets here: 5 us a call instead of 8."""


class _Finish(torch.autograd.Function):
    """What a norm and an activation have yet to do, done; a residual is added."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[float, str], x: Tensor, *tensors: Any) -> Tensor:
        *norm, residual = tensors
        before = Before.of(norm, *rest)
        assert before is not None
        ready = _Norm.of(before, x.shape[1])
        ctx.rest, ctx.ready = rest, ready
        ctx.save_for_backward(x, *norm)
        return kernels.finish(x, ready.prologue, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *norm = ctx.saved_tensors
        need, rest = ctx.needs_input_grad[1:], ctx.rest
        if _by_pytorch((grad,)):

            def compose(x: Tensor, *norm: Any) -> tuple[Tensor]:
                return (composed(x, Before.of(norm, *rest)),)

            return None, *composed_gradients(compose, (grad,), (x, *norm), need[:5]), grad if need[5] else None
        found = kernels.finish_gradients(grad, x, ctx.ready.prologue)
        of_norm = ctx.ready.gradients(found.sum, found.deviation, need[1:5])
        return None, found.x if need[0] else None, *of_norm, grad if need[5] else None


_finish: Callable[..., Tensor] = super(torch.autograd.Function, _Finish).apply


def stage(
    how: StageConvolution,
    x: Tensor,
    before: Before | None,
    weight: Tensor,
    bias: Tensor | None,
    statistics: bool,
) -> StageOutput:
    """The convolution of ``act(norm(x))``, and mean and variance of its channels where they are wanted.

    The weight may have more digits than x: it is rounded where it is read, and its gradient is not.

    Shape:
        x: (N, C, H, W)    weight: (O, C/groups, kH, kW)    ->    y: (N, O, Ho, Wo), mean and var: (O,)
    """
    norm, rest = _taken_apart(before)
    found = _stage(how, statistics, rest, x, *norm, weight, bias)
    return StageOutput(*found) if statistics else StageOutput(found[0], None, None)


def finish(x: Tensor, before: Before, residual: Tensor | None = None) -> Tensor:
    """``act(norm(x)) + residual``.

    Shape:
        x, residual: (N, C, H, W)    ->    (N, C, H, W)
    """
    norm, rest = _taken_apart(before)
    return _finish(rest, x, *norm, residual)


def _taken_apart(before: Before | None) -> tuple[Sequence[Tensor | None], tuple[float, str]]:
    if before is None:
        return (None, None, None, None), (0.0, "")
    return before[:4], before[4:]


def unpaid(
    how: StageConvolution,
    x: Tensor,
    before: Before | None,
    weight: Tensor,
    bias: Tensor | None,
    statistics: bool = False,
) -> str:
    """Why no kernel of ours computes a stage, so that PyTorch's operations one by one are faster; "" if one does."""
    activation = None if before is None else before.activation
    choice = kernels.forward_choice(how.op, x, activation, weight, bias, how.geometry, statistics)
    if choice.backend.name != "torch":
        return ""
    return "; ".join(choice.reasons.values()) or f"there is no kernel for a {how.op} stage"


# Measured on Granite Rapids, forward and back: faster than PyTorch's convolution from here on; 0.7 to 0.9 of its speed
# of a quarter as many.
_LEAST_ALONE = 1 << 19


def pays_alone(how: StageConvolution, x: Tensor, weight: Tensor) -> bool:
    """Whether a pointwise convolution with neither norm nor activation is worth a stage: all its gradients come from
    one walk over that of its result."""
    if how.op != "pointwise" or x.dtype is not torch.float32 or not pointwise.pays_bare():
        return False
    return x.numel() // x.shape[1] * sum(weight.shape[:2]) >= _LEAST_ALONE and not unpaid(how, x, None, weight, None)
