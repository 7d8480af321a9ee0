"""Depthwise, pointwise: M filters for each input channel, then one layer that mixes them.

Closed form, without any data. For input channel c the slice W[:, c] of a normal convolution is a matrix of O rows
(output channels) and k columns (taps). A depthwise layer with M filters per channel followed by a pointwise layer gives
exactly the slices of rank at most M, so the best approximation is the truncated singular value decomposition of each
slice on its own, and its squared error is the sum of the dropped squared singular values (Eckart and Young 1936; Guo et
al. 2018, arXiv:1808.05517; He et al. 2019, arXiv:1910.09455). At M = min(O, k) it is exact.

Data-aware: filters and columns that give the smallest *output* error on the patches a layer really sees. Three steps in
closed form, none of which can raise it:

- :func:`weighted_start`: per channel, the truncated SVD in the metric of that channel's own patches; ignores what
  channels have in common.
- :func:`solve_columns`: for given filters, the pointwise layer by least squares over all channels at once.
- :func:`sweep`: channel by channel, filters *and* columns of that channel at once, all others fixed. The best rank-M
  answer to what the others leave is again a truncated SVD, so each step is a global optimum of its block.

The first two are the generalised SVD and the least-squares pointwise layer of He et al. 2019; alternating them by whole
blocks is ours. Everything is in float64.

Letters: O output channels, C input channels, k taps (the product of the filter size), M depth multiplier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.forms.curve import spread
from sepconv.convert.problem import LeastSquares
from sepconv.convert.replace import empty_separable, fill, like

TRIALS = 8
"""Ranks of a layer, beside the last, that are fitted before ranks are chosen."""


class SeparableFactors(NamedTuple):
    """What a separable layer is made of.

    Shape:
        filters: (C, M, k)    columns: (O, C, M), the pointwise layer
    """

    filters: Tensor
    columns: Tensor


def slices(weight: Tensor) -> Tensor:
    """The (O, k) slice of every input channel.

    Shape:
        weight: (O, C, *kernel)    ->    (C, O, k)
    """
    return weight.flatten(2).transpose(0, 1)


def full_rank(weight: Tensor) -> int:
    """The depth multiplier at which the separable form is exact for every weight of this shape: min(O, k)."""
    return min(weight.shape[0], weight[0, 0].numel())


def weights(conv: _ConvNd, depth_multiplier: int) -> int:
    """Those of the separable layer in the place of a convolution."""
    return depth_multiplier * conv.in_channels * (conv.weight[0, 0].numel() + conv.out_channels)


def truncated_svd(weight: Tensor, depth_multiplier: int, scale: Tensor | None = None) -> SeparableFactors:
    """Depthwise filters and pointwise columns of the best separable approximation.

    Args:
        weight: the normal convolution.
        depth_multiplier: filters per input channel, M.
        scale: what output channel o is multiplied with afterwards (a batch norm's gamma / sqrt(var + eps)); its square
            weighs the error of that channel. Default: 1.

    Shape:
        weight: (O, C, *kernel), scale: (O,)    ->    filters: (C, M, k), columns: (O, C, M)
    """
    matrices = slices(weight)
    if scale is None:
        filters = torch.linalg.svd(matrices, full_matrices=False).Vh[:, :depth_multiplier]
    else:
        filters = torch.linalg.svd(matrices * scale[:, None], full_matrices=False).Vh[:, :depth_multiplier]
    # The filters of a slice are orthonormal rows, so the projection on them is the best column for every output
    # channel, those of scale 0 included.
    columns = torch.einsum("cok,cmk->ocm", matrices, filters)
    return SeparableFactors(filters, columns)


def dropped_energy(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared error of :func:`truncated_svd` for M = 0 (everything dropped), 1, ..., min(O, k).

    Shape:
        weight: (O, C, *kernel), scale: (O,)    ->    (min(O, k) + 1,)
    """
    matrices = slices(weight) if scale is None else slices(weight) * scale[:, None]
    energy = torch.linalg.svdvals(matrices).square().sum(0)
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


def compose(filters: Tensor, columns: Tensor) -> Tensor:
    """The normal convolution that a depthwise and a pointwise layer amount to.

    Shape:
        filters: (C, M, k), columns: (O, C, M)    ->    (O, C, k)
    """
    return torch.einsum("ocm,cmk->ock", columns, filters)


def balance(filters: Tensor, columns: Tensor) -> SeparableFactors:
    """Give filter and column of each (c, m) the same norm, which leaves their product as it was.

    Later training then moves both at the same pace.
    """
    rows, cols = filters.norm(dim=2), columns.norm(dim=0)
    ratio = torch.where((rows > 0) & (cols > 0), (cols / rows.clamp_min(1e-300)).sqrt(), torch.ones_like(rows))
    return SeparableFactors(filters * ratio[:, :, None], columns / ratio)


def _roots(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of symmetric positive definite blocks (C, k, k)."""
    values, vectors = torch.linalg.eigh(blocks)
    values = values.clamp_min(values.amax(-1, keepdim=True).clamp_min(1e-300) * 1e-14)
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    inverse = (vectors * values.rsqrt()[:, None]) @ vectors.mT
    return root, inverse


def _best_rank(target: Tensor, metric: Tensor, root: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-M answer to targets (C, O, k) in the metrics of outputs and of patches."""
    gram = root @ (target.mT @ (metric @ target)) @ root
    basis = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
    return basis.mT @ inverse, target @ (root @ basis)


def weighted_start(problem: LeastSquares, weight: Tensor, depth_multiplier: int) -> SeparableFactors:
    """Per channel, the best rank-M approximation of the weight on that channel's own patches.

    Shape:
        weight: (O, C, k)    ->    filters: (C, M, k), columns: (O, C, M)
    """
    root, inverse = _roots(problem.own_blocks())
    filters, columns = _best_rank(weight.transpose(0, 1), problem.metric, root, inverse, depth_multiplier)
    return SeparableFactors(filters, columns.transpose(0, 1))


def solve_columns(problem: LeastSquares, filters: Tensor) -> Tensor:
    """The pointwise layer that is best for given filters: yz zz^-1, with z the depthwise outputs.

    Shape:
        filters: (C, M, k)    ->    (O, C, M)
    """
    c, m, k = filters.shape
    zx = torch.bmm(filters, problem.xx.view(c, k, c * k)).view(c * m, c, k)
    zz = torch.bmm(zx.transpose(0, 1), filters.mT).permute(1, 0, 2).reshape(c * m, c * m)
    yz = torch.einsum("ock,cmk->ocm", problem.yx.view(-1, c, k), filters).flatten(1)
    # Filters of one channel may be dependent (an image that is constant in one direction); scaling to a unit diagonal
    # and a jitter at the edge of float64 keep the factorisation defined.
    scale = zz.diagonal().clamp_min(1e-300).rsqrt()
    zz = scale[:, None] * zz * scale
    zz.diagonal().add_(1e-12)
    solution = torch.cholesky_solve((yz * scale).T, torch.linalg.cholesky(zz)).T * scale
    return solution.view(-1, c, m)


def sweep(problem: LeastSquares, filters: Tensor, columns: Tensor) -> SeparableFactors:
    """Improve filters and columns channel by channel, each against what all the others leave over.

    Shape:
        filters: (C, M, k), columns: (O, C, M)    ->    the same
    """
    root, inverse = _roots(problem.own_blocks())
    filters, columns = filters.clone(), columns.clone()
    weight = compose(filters, columns).flatten(1)
    for c in range(problem.channels):
        block = problem.block(c)
        residual = problem.yx[:, block] - weight @ problem.xx[:, block]
        target = weight[:, block] + residual @ inverse[c] @ inverse[c]
        filters[c], columns[:, c] = _best_rank(target, problem.metric, root[c], inverse[c], filters.shape[1])
        weight[:, block] = columns[:, c] @ filters[c]
    return SeparableFactors(filters, columns)


def calibrate(problem: LeastSquares, weight: Tensor, depth_multiplier: int, sweeps: int) -> SeparableFactors:
    """Start, least squares, then rounds of sweep and least squares.

    Shape:
        weight: (O, C, k)    ->    filters: (C, M, k), columns: (O, C, M)
    """
    filters, columns = weighted_start(problem, weight, depth_multiplier)
    columns = solve_columns(problem, filters)
    for _ in range(sweeps):
        filters, columns = sweep(problem, filters, columns)
        columns = solve_columns(problem, filters)
    return SeparableFactors(filters, columns)


class SeparableForm:
    """Its rank is the depth multiplier; exact at M = min(O, k)."""

    name: ClassVar[str] = "separable"
    trial_sweeps: ClassVar[int] = 1

    def ranks(self, conv: _ConvNd) -> list[int]:
        """1 to 9, then in steps of an eighth, and full rank."""
        most = full_rank(conv.weight)
        found = list(range(1, min(most, 9) + 1))
        while found[-1] < most:
            found.append(min(most, found[-1] + found[-1] // 8))
        return found

    def trials(self, ranks: Sequence[int]) -> list[int]:
        # The last may be exact: no curve leads there.
        return [*spread(ranks[:-1], TRIALS), ranks[-1]] if ranks else []

    def of_multiplier(self, conv: _ConvNd, depth_multiplier: int) -> int:
        return min(depth_multiplier, full_rank(conv.weight))

    def weights(self, conv: _ConvNd, rank: int) -> int:
        return weights(conv, rank)

    def macs(self, conv: _ConvNd, rank: int, inputs: int, outputs: int) -> int:
        return weights(conv, rank) * outputs

    def start(self, weight: Tensor, rank: int, scale: Tensor | None, brief: bool = False) -> SeparableFactors:
        return truncated_svd(weight.double(), rank, scale)

    def dropped(self, weight: Tensor, ranks: Sequence[int], scale: Tensor | None) -> list[float]:
        energy = dropped_energy(weight.double(), scale)
        return [float(energy[rank] / energy[0].clamp_min(1e-300)) for rank in ranks]

    def fit(self, problem: LeastSquares, weight: Tensor, start: SeparableFactors, sweeps: int) -> SeparableFactors:
        return calibrate(problem, weight.double().flatten(2), start.filters.shape[1], sweeps)

    def compose(self, factors: SeparableFactors) -> Tensor:
        return compose(*factors)

    def layer(self, conv: _ConvNd, factors: SeparableFactors, shift: Tensor | None = None) -> nn.Module:
        filters, columns = balance(*factors)
        layer = empty_separable(conv, conv.in_channels, filters.shape[1], has_bias=shift is not None)
        fill(layer, filters, columns, conv, shift)
        return like(conv, layer)

    def empty(self, conv: _ConvNd, rank: int) -> nn.Module:
        return empty_separable(conv, conv.in_channels, rank)
