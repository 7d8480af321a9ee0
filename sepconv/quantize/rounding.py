"""Weights as integers: a scale for each output channel, and the way every weight is rounded.

Rounding each weight to the nearest step is not the best for a sum of products. Where inputs vary together, the error of
one weight can be made good by the next: column after column is rounded, and what is lost is given to the columns that
are still to come, by the second moments of the inputs (Frantar et al. 2022, arXiv:2210.17323) that the network of
integers lets through. For depthwise layers the columns are the taps of a filter.

To fit weights to the original's outputs on these inputs before they are rounded was tried, and made the outputs of
whole networks worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sepconv.ops.quantized import MOST
from sepconv.quantize.moments import InputMoments

ROUNDINGS = ("moments", "nearest")

CLIPS = 40
"""Scales tried, from the one that reaches the largest weight down to half of it."""

DAMPING = 1e-2
"""Of the mean variance of an input: what holds weights that hardly count to the nearest step."""

BLOCK = 64
"""Columns whose losses are handed to those behind them in one product."""


@dataclass
class Rounded:
    """Shape: weight like the layer's, on the steps; scale (O,). And the mean squared error of an output."""

    weight: Tensor
    scale: Tensor
    lost: float


def weight_scale(weight: Tensor, importance: Tensor | None, method: str) -> Tensor:
    """For each output channel the scale with the least squared error.

    Args:
        importance: how much the error of each weight counts, like the weight; all the same without.
        method: as for activations; "minmax" reaches the largest weight.

    Shape:
        weight: (O, F)    ->    (O,)
    """
    weight = weight.double()
    largest = weight.abs().amax(1)
    whole = torch.where(largest > 0, largest / MOST, torch.ones_like(largest)).float()
    if method == "minmax":
        return whole
    importance = torch.ones_like(weight) if importance is None else importance.double()
    best, best_error = whole, torch.full_like(largest, torch.inf)
    for share in torch.linspace(1, 0.5, CLIPS).tolist():
        scale = (whole * share).clamp_min(torch.finfo(torch.float32).tiny)
        error = (importance * (weight - to_nearest(weight, scale)).square()).sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def to_nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Shape: weight (..., F), scale (...)"""
    step = scale.to(weight.dtype)[..., None]
    return (weight / step).round().clamp(-MOST, MOST) * step


@torch.no_grad()
def round_weight(weight: Tensor, moments: InputMoments, ranges: str, rounding: str) -> Rounded:
    """A layer's weight on steps.

    Shape:
        weight: (O, ...)
    """
    groups, features = moments.mean.shape
    wanted = weight.detach().double().reshape(groups, -1, features)
    importance = moments.xx.diagonal(dim1=1, dim2=2)[:, None].expand_as(wanted).flatten(0, 1)
    level = importance.mean(1, keepdim=True)
    scale = weight_scale(wanted.flatten(0, 1), importance + DAMPING * level + 1e-30, ranges)
    by_group = scale.reshape(groups, -1)
    if rounding == "moments":
        found = _one_after_the_other(wanted, moments.xx, by_group)
    else:
        found = to_nearest(wanted, by_group)
    change = found - wanted
    lost = float(((change @ moments.xx) * change).sum(2).mean())
    return Rounded(found.reshape(weight.shape).to(weight.dtype), scale, lost)


def _damped(xx: Tensor, part: float) -> Tensor:
    level = xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return xx + torch.diag_embed((part * level)[:, None].expand(-1, xx.shape[1]))


def _one_after_the_other(weight: Tensor, xx: Tensor, scale: Tensor) -> Tensor:
    """Shape: weight (G, O, F), xx (G, F, F), scale (G, O)"""
    damped = _damped(xx, DAMPING)
    order = damped.diagonal(dim1=1, dim2=2).argsort(1, descending=True)  # what counts most comes first
    back = order.argsort(1)
    damped = _take(_take(damped, order, 1), order, 2)
    left = _take(weight, order, 2).clone()
    inverse = torch.linalg.inv(damped)
    upper = torch.linalg.cholesky((inverse + inverse.transpose(1, 2)) / 2, upper=True)
    found, features = torch.empty_like(left), left.shape[2]
    for start in range(0, features, BLOCK):
        end = min(start + BLOCK, features)
        lost = torch.empty_like(left[:, :, start:end])
        for i in range(start, end):
            column = left[:, :, i]
            found[:, :, i] = to_nearest(column[..., None], scale)[..., 0]
            lost[:, :, i - start] = (column - found[:, :, i]) / upper[:, i, i, None]
            left[:, :, i + 1 : end] -= lost[:, :, i - start, None] * upper[:, None, i, i + 1 : end]
        left[:, :, end:] -= lost @ upper[:, start:end, end:]
    return _take(found, back, 2)


def _take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    index = order[:, None] if dim == 2 else order[:, :, None]
    return x.gather(dim, index.expand_as(x))
