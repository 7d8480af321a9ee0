"""Closed form: the best separable approximation of one normal convolution, without any data.

For input channel c the slice W[:, c] of a normal convolution is a matrix of O rows (output channels) and k columns
(taps). A depthwise layer with M filters per channel followed by a pointwise layer gives exactly the slices of rank at
most M, so the best approximation is the truncated singular value decomposition of each slice on its own, and its
squared error is the sum of the dropped squared singular values (Eckart and Young 1936; Guo et al. 2018,
arXiv:1808.05517; He et al. 2019, arXiv:1910.09455). At M = min(O, k) it is exact.

Letters: O output channels, C input channels, k taps (the product of the filter size), M depth multiplier.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slices(weight: Tensor) -> Tensor:
    """The (O, k) slice of every input channel.

    Shape:
        weight: (O, C, *kernel)    ->    (C, O, k)
    """
    return weight.flatten(2).transpose(0, 1)


def full_rank(weight: Tensor) -> int:
    """The depth multiplier at which the separable form is exact for every weight of this shape: min(O, k)."""
    return min(weight.shape[0], weight[0, 0].numel())


def truncated_svd(weight: Tensor, depth_multiplier: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
    return filters, columns


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


def balance(filters: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Give filter and column of each (c, m) the same norm, which leaves their product as it was.

    Later training then moves both at the same pace.
    """
    rows, cols = filters.norm(dim=2), columns.norm(dim=0)
    ratio = torch.where((rows > 0) & (cols > 0), (cols / rows.clamp_min(1e-300)).sqrt(), torch.ones_like(rows))
    return filters * ratio[:, :, None], columns / ratio
