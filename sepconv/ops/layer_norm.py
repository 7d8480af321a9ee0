"""LayerNorm along the last dimension while a network trains: one pass over memory forward and one back."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.kernels import stages as kernels
from sepconv.ops import tracing
from sepconv.ops.stages import composed_gradients


def _as_image(x: Tensor) -> Tensor:
    """Rows of numbers as pixels of channels."""
    channels = x.shape[-1]
    rows = prod(x.shape[:-1])
    return x.as_strided((1, channels, 1, rows), (rows * channels, 1, rows * channels, channels))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias)
        y = kernels.layer_norm(_as_image(x), weight, bias, eps)
        return y.as_strided(x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        need, eps = ctx.needs_input_grad[1:], ctx.eps
        if torch.is_grad_enabled() or tracing.transformed(grad):

            def compose(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor]:
                return (F.layer_norm(x, x.shape[-1:], weight, bias, eps),)

            return None, *composed_gradients(compose, (grad,), (x, weight, bias), need)
        found = kernels.layer_norm_gradients(_as_image(grad.contiguous()), _as_image(x), weight, eps)
        of_x = found.x.as_strided(x.shape, x.stride()) if need[0] else None
        return None, of_x, found.deviation if need[1] else None, found.sum if need[2] else None


_layer_norm: Callable[..., Tensor] = super(torch.autograd.Function, _LayerNorm).apply


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.layer_norm`` of a contiguous x.

    Shape:
        x: (..., C)    weight, bias: (C,)    ->    (..., C)
    """
    return _layer_norm(eps, x, weight, bias)


def unpaid(x: Tensor, eps: float) -> str:
    """Why no kernel of ours computes it; "" if one does."""
    if x.dim() < 2 or not x.is_contiguous() or not x.numel():
        return "LayerNorm is for contiguous rows of numbers"
    choice = kernels.layer_norm_choice(_as_image(x), eps)
    return "" if choice.backend.name != "torch" else "; ".join(choice.reasons.values())
