"""Data-aware: filters and columns that give the smallest *output* error on the patches a layer really sees.

With xx = E[p p^T] over patches p of C*k values, yx = E[y p^T] for target outputs y, and a metric G on output
channels, the error of a separable layer A (O x C*k, slices of rank M) is

    E[(y - A p)^T G (y - A p)] = const - 2 <G yx, A> + <G A xx, A>.

Three closed-form steps, none of which can raise it:

- :func:`weighted_start`: per channel, the truncated SVD in the metric of that channel's own patches; ignores what
  channels have in common.
- :func:`solve_columns`: for given filters, the pointwise layer by least squares over all channels at once.
- :func:`sweep`: channel by channel, filters *and* columns of that channel at once, all others fixed. The best rank-M
  answer to what the others leave is again a truncated SVD, so each step is a global optimum of its block.

The first two are the generalised SVD and the least-squares pointwise of He et al. 2019, arXiv:1910.09455; alternating
them by whole blocks is ours. Everything is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sepconv.convert.factor import compose


@dataclass
class Problem:
    """One layer's least-squares problem, centred (the bias follows from the means) and regularised.

    Shape:
        xx: (C*k, C*k)    yx: (O, C*k)    yy: (O, O)    metric: (O, O)
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    metric: Tensor
    channels: int

    @property
    def taps(self) -> int:
        return self.xx.shape[0] // self.channels

    def block(self, channel: int) -> slice:
        return slice(channel * self.taps, (channel + 1) * self.taps)

    def own_blocks(self) -> Tensor:
        """The (k, k) patch covariance of every channel: (C, k, k)."""
        blocks = self.xx.view(self.channels, self.taps, self.channels, self.taps)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def error(self, weight: Tensor) -> float:
        """The metric's squared error of a layer of shape (O, C, k)."""
        flat = weight.flatten(1)
        cross = self.yx @ flat.T
        total = self.yy - cross - cross.T + flat @ self.xx @ flat.T
        return max(0.0, float((self.metric * total).sum()))

    def total(self) -> float:
        """The error of a layer that answers zero everywhere, which relative errors are relative to."""
        return float((self.metric * self.yy).sum())

    def relative_error(self, weight: Tensor) -> float:
        return self.error(weight) / max(self.total(), 1e-300)


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


def weighted_start(problem: Problem, weight: Tensor, depth_multiplier: int) -> tuple[Tensor, Tensor]:
    """Per channel, the best rank-M approximation of the weight on that channel's own patches.

    Shape:
        weight: (O, C, k)    ->    filters: (C, M, k), columns: (O, C, M)
    """
    root, inverse = _roots(problem.own_blocks())
    filters, columns = _best_rank(weight.transpose(0, 1), problem.metric, root, inverse, depth_multiplier)
    return filters, columns.transpose(0, 1)


def solve_columns(problem: Problem, filters: Tensor) -> Tensor:
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


def sweep(problem: Problem, filters: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
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
    return filters, columns


def calibrate(problem: Problem, weight: Tensor, depth_multiplier: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Start, least squares, then rounds of sweep and least squares.

    Shape:
        weight: (O, C, k)    ->    filters: (C, M, k), columns: (O, C, M)
    """
    filters, columns = weighted_start(problem, weight, depth_multiplier)
    columns = solve_columns(problem, filters)
    for _ in range(sweeps):
        filters, columns = sweep(problem, filters, columns)
        columns = solve_columns(problem, filters)
    return filters, columns
