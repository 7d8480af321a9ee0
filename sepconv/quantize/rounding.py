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
from torch.nn import functional as F

from sepconv.ops.quantized import MOST
from sepconv.quantize.moments import InputMoments

ROUNDINGS = ("moments", "nearest")

CLIPS = 40
"""Scales tried, from the one that reaches the largest weight down to half of it."""

DAMPING = 1e-2
"""Of the mean variance of an input: what holds weights that hardly count to the nearest step."""

BLOCK = 64
"""Columns whose losses are handed to those behind them in one product."""

CACHED = 1 << 16
"""Weights whose scales are sought at once."""


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
    importance = torch.ones_like(weight) if importance is None else importance
    rows = max(1, CACHED // weight.shape[1])
    parts = zip(weight.split(rows), importance.split(rows), whole.split(rows), strict=True)
    return torch.cat([_least_error(*part) for part in parts])


def _least_error(weight: Tensor, importance: Tensor, whole: Tensor) -> Tensor:
    """Of rows that fit into a cache, since every scale reads them all."""
    weight, importance = weight.float(), (importance / importance.amax(1, keepdim=True)).float()
    best, best_error = whole, torch.full_like(whole, torch.inf)
    for share in torch.linspace(1, 0.5, CLIPS).tolist():
        scale = (whole * share).clamp_min(torch.finfo(torch.float32).tiny)
        lost = to_nearest(weight, scale).sub_(weight).square_()
        error = torch.linalg.vecdot(lost, importance)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def to_nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Shape: weight (..., F), scale (...)"""
    step = scale.to(weight.dtype)[..., None]
    return (weight / step).round_().clamp_(-MOST, MOST).mul_(step)


@torch.no_grad()
def round_weight(weight: Tensor, moments: InputMoments, ranges: str, rounding: str) -> Rounded:
    """A layer's weight on steps.

    Shape:
        weight: (O, ...)
    """
    parts, features = moments.parts, moments.xx.shape[1]
    groups = len(moments.xx) // parts
    flat = weight.detach().double().flatten(1)
    wanted = F.pad(flat, (0, parts * features - flat.shape[1]))
    importance = moments.xx.diagonal(dim1=1, dim2=2).reshape(groups, -1).repeat_interleave(len(flat) // groups, 0)
    level = importance.mean(1, keepdim=True)
    scale = weight_scale(wanted, importance + DAMPING * level + 1e-30, ranges)
    by_group = scale.reshape(groups, 1, -1).expand(-1, parts, -1).flatten(0, 1)
    columns = wanted.reshape(groups, -1, parts, features).permute(0, 2, 3, 1).flatten(0, 1)  # (G*parts, F, O)
    if rounding == "moments":
        found = _one_after_the_other(columns, moments.xx, by_group)
    else:
        found = _columns_to_nearest(columns, by_group)
    change = found - columns
    lost = float(((moments.xx @ change) * change).sum()) / len(flat)
    found = found.reshape(groups, parts, features, -1).permute(0, 3, 1, 2).reshape(len(flat), -1)
    return Rounded(found[:, : flat.shape[1]].reshape(weight.shape).to(weight.dtype), scale, lost)


def _columns_to_nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Shape: weight (G, F, O), scale (G, O)"""
    return to_nearest(weight.transpose(1, 2), scale).transpose(1, 2)


def _damped(xx: Tensor, part: float) -> Tensor:
    level = xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return xx + torch.diag_embed((part * level)[:, None].expand(-1, xx.shape[1]))


def _root_of_inverse(xx: Tensor) -> Tensor:
    """The upper triangular matrix u with the inverse of ``xx`` as u^T u."""
    lower = torch.linalg.cholesky(xx.flip(1, 2))
    eye = torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve_triangular(lower.flip(1, 2), eye, upper=True)


def _one_after_the_other(weight: Tensor, xx: Tensor, scale: Tensor) -> Tensor:
    """Shape: weight (G, F, O), xx (G, F, F), scale (G, O)"""
    damped = _damped(xx, DAMPING)
    order = damped.diagonal(dim1=1, dim2=2).argsort(1, descending=True)  # what counts most comes first
    damped = damped.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    upper, scale = _root_of_inverse(damped), scale.double()
    left = weight.take_along_dim(order[:, :, None], 1)
    found, features = torch.empty_like(left), left.shape[1]
    for start in range(0, features, BLOCK):
        end = min(start + BLOCK, features)
        lost = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            column = left[:, i]
            found[:, i] = (column / scale).round_().clamp_(-MOST, MOST).mul_(scale)
            lost[:, i - start] = (column - found[:, i]) / upper[:, i, i, None]
            left[:, i + 1 : end] -= upper[:, i, i + 1 : end, None] * lost[:, i - start, None]
        left[:, end:] -= upper[:, start:end, end:].transpose(1, 2) @ lost
    return found.take_along_dim(order.argsort(1)[:, :, None], 1)
