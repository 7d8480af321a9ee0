"""Stages beside what they are: convolution, nn.BatchNorm2d and activation in float64, differentiated by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepconv.activations import ACTIVATIONS
from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.prologue import Deviation, Prologue
from sepconv.kernels.stages import StageChoice

EPS = 1e-5


def geometry(stride: int = 1, padding: int = 1, dilation: int = 1) -> Geometry:
    return Geometry((stride, stride), ((padding, padding),) * 2, (dilation, dilation))


def prologue_of(z: Tensor, gamma: Tensor, beta: Tensor, activation: str) -> Prologue:
    """A batch norm over z, as a prologue."""
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    return Prologue(mean, gamma * torch.rsqrt(var + EPS), beta, activation)


def single(prologue: Prologue | None) -> Prologue | None:
    if prologue is None:
        return None
    return Prologue(*[vector.float() for vector in prologue[:3]], prologue.activation)


@dataclass
class Truth:
    """The stage in float64: what is given, and what autograd makes of random gradients of y, mean and var."""

    x: Tensor
    prologue: Prologue | None
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    deviation: Deviation
    y: Tensor
    mean: Tensor
    var: Tensor
    gradients: dict[str, Tensor]


def truth(
    x: Tensor, activation: str | None, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype
) -> Truth:
    """``x`` and the gradients are numbers that ``dtype`` has, in the layout of x; the prologue's are of 32 bits."""
    channels, x64 = x.shape[1], x.double().clone()
    given = {"x": x64.requires_grad_(), "weight": weight.double().clone().requires_grad_()}
    if bias is not None:
        given["bias"] = bias.double().clone().requires_grad_()
    prologue, h = None, x64
    if activation is not None:
        gamma, beta = torch.rand(channels) + 0.5, torch.randn(channels)
        prologue = prologue_of(x.float(), gamma, beta, activation)
        vectors = [vector.double().requires_grad_() for vector in prologue[:3]]
        given |= dict(zip(("mean", "scale", "shift"), vectors, strict=True))
        mean, scale, shift = (vector[:, None, None] for vector in vectors)
        h = ACTIVATIONS[activation].function((x64 - mean) * scale + shift)
    groups = channels // weight.shape[1]
    padding = [low for low, _ in geometry.padding]
    y = nn.functional.conv2d(h, given["weight"], given.get("bias"), geometry.stride, padding, geometry.dilation, groups)
    var_y, mean_y = torch.var_mean(y, (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    grad_mean, grad_var = (torch.randn(y.shape[1]).double() * count / part for part in (7, 5))
    loss = (y * grad.double()).sum() + (mean_y * grad_mean).sum() + (var_y * grad_var).sum()
    gradients = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
    deviation = Deviation(y.detach(), mean_y.detach(), grad_mean / count, 2 * grad_var / count)
    return Truth(x, prologue, weight, bias, grad, deviation, y.detach(), mean_y.detach(), var_y.detach(), gradients)


def relative(found: Tensor, true: Tensor) -> float:
    """The largest error over the largest number."""
    return float((found.double() - true).abs().max() / true.abs().max().clamp(min=1e-30))


def channels_last(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, pixel by pixel in memory."""
    return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)


def by(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], *given: Any) -> tuple[Any, StageChoice]:
    """What a stage's function returns, and who computed it; what is not written stays NaN."""
    seen: list[StageChoice] = []
    token = stages.watcher.set(seen.append)
    empty = torch.empty
    try:
        monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(torch.nan))
        result = call(*given)
    finally:
        monkeypatch.setattr(torch, "empty", empty)
        stages.watcher.reset(token)
    [choice] = seen
    return result, choice


def with_threads(counts: tuple[int, ...], call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """The results by so many threads each."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found
