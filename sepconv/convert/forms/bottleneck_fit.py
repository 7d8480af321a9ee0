"""The fit of a bottleneck to images: least squares for each of its three layers in turn.

The error is quadratic in each layer for given others. The last one is solved for at once. For the first and for the
filters the equations are as many as there are weights, so a few steps of conjugate gradients go on from what they are.
What the patches say about channels apart from taps, (sum over taps) x (sum over channels), gives equations that are
solved factor by factor (the Kronecker form of K-FAC, Martens and Grosse 2015, arXiv:1503.05671) and near enough to the
real ones that two steps do.

Products with the second moments are computed in the precision of the network, all that is solved for in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.convert.problem import LeastSquares

STEPS = 2
"""Of conjugate gradients for one layer in one round."""

GAIN = 2e-3
"""Part of the error that a round must save for another to follow."""

DAMPING = 1e-6
"""On the diagonals of the equations that are nearly those to solve, as a part of their mean."""

TINY = 1e-300


class BottleneckFactors(NamedTuple):
    """What a bottleneck is made of.

    Shape:
        expand: (O, R), the last pointwise layer    reduce: (C, R), the first    filters: (R, k)
    """

    expand: Tensor
    reduce: Tensor
    filters: Tensor


def jitter(dtype: torch.dtype) -> float:
    """On the unit diagonals of :func:`solve`: keeps systems of dependent terms defined, whose products are of this."""
    return 1e-9 if dtype == torch.float64 else 1e-6


def solve(gram: Tensor, right: Tensor, jitter: float) -> Tensor:
    """gram^-1 right, scaled to a unit diagonal; both are float64."""
    scale = gram.diagonal().clamp_min(TINY).rsqrt()
    gram = scale[:, None] * gram * scale
    gram.diagonal().add_(jitter)
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * right, torch.linalg.cholesky(gram))


@dataclass
class _Fit:
    """One fit under way: the factors, their terms, and what is known of these.

    ``xx`` are the second moments in the precision that products are computed in. ``seen`` are the terms times these; it
    follows the terms step by step, as each such product is as much work as all the rest of a step.

    Shape:
        terms, seen: (R, C*k)
    """

    problem: LeastSquares
    xx: Tensor
    factors: BottleneckFactors

    def __post_init__(self) -> None:
        c, k = self.problem.channels, self.problem.taps
        blocks = self.problem.xx.view(c, k, c, k)
        self.by_channel = blocks.diagonal(dim1=1, dim2=3).sum(-1)
        self.by_tap = blocks.diagonal(dim1=0, dim2=2).sum(-1) / self.by_channel.trace().clamp_min(TINY)
        self.terms = terms(self.factors)
        self.seen = self.see(self.terms)

    def see(self, terms: Tensor) -> Tensor:
        return (terms.to(self.xx) @ self.xx).double()

    def solve_expand(self) -> float:
        """The last pointwise layer by least squares over all R channels at once. Returns the error then."""
        right = self.terms @ self.problem.yx.T
        gram = self.seen @ self.terms.T
        expand = solve((gram + gram.T) / 2, right, jitter(self.xx.dtype)).T
        self.factors = self.factors._replace(expand=expand)
        return self.problem.total() - float(((self.problem.metric @ expand) * right.T).sum())

    def improve(self) -> None:
        """Better first layer, then better filters, for the last layer that there is."""
        expand, reduce, filters = self.factors
        weighed = self.problem.metric @ expand
        products, wanted = expand.T @ weighed, weighed.T @ self.problem.yx
        nearly = _Nearly(products * (filters @ self.by_tap @ filters.T), self.by_channel)
        reduce = self._descend(_Part(products, wanted, nearly, filters, of_channels=True), reduce.T).T
        nearly = _Nearly(products * (reduce.T @ self.by_channel @ reduce), self.by_tap)
        filters = self._descend(_Part(products, wanted, nearly, reduce.T, of_channels=False), filters)
        self.factors = BottleneckFactors(expand, reduce, filters)

    def _descend(self, part: _Part, x: Tensor) -> Tensor:
        """From x on by conjugate gradients; no step makes the error larger."""
        residual = part.project(part.wanted - part.products @ self.seen)
        direction = near = part.nearly.solve(residual)
        size = (residual * near).sum()
        for _ in range(STEPS):
            seen = self.see(part.terms(direction))
            answer = part.project(part.products @ seen)
            curvature = (direction * answer).sum()
            if not (size > 0 and curvature > 0):  # nothing but rounding is left
                break
            length = size / curvature
            x, residual = x + length * direction, residual - length * answer
            self.seen += length * seen
            near = part.nearly.solve(residual)
            before, size = size, (residual * near).sum()
            direction = near + size / before * direction
        self.terms = part.terms(x)
        return x


class _Nearly:
    """Solves rows X columns = right for (R, n) matrices, with a little on both diagonals.

    Shape:
        rows: (R, R), columns: (n, n)
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = _root(rows), _root(columns)

    def solve(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(right, self.rows).T, self.columns).T


def _root(matrix: Tensor) -> Tensor:
    level = float(matrix.diagonal().mean()) or 1.0
    return torch.linalg.cholesky(matrix + DAMPING * level * torch.eye(len(matrix)).to(matrix))


@dataclass(frozen=True)
class _Part:
    """The equations of the first layer (``of_channels``) or of the filters: products X seen = wanted, projected.

    Shape:
        products: (R, R), of the last layer's columns in the metric    wanted: (R, C*k)
        other: (R, k) if ``of_channels``, else (R, C); x: the other way round
    """

    products: Tensor
    wanted: Tensor
    nearly: _Nearly
    other: Tensor
    of_channels: bool

    def terms(self, x: Tensor) -> Tensor:
        channels, taps = (x, self.other) if self.of_channels else (self.other, x)
        return (channels[:, :, None] * taps[:, None]).flatten(1)

    def project(self, values: Tensor) -> Tensor:
        """What values (R, C*k) have to say about x."""
        if self.of_channels:
            return torch.bmm(values.view(len(values), -1, self.other.shape[1]), self.other[:, :, None])[:, :, 0]
        return torch.bmm(self.other[:, None], values.view(len(values), self.other.shape[1], -1))[:, 0]


def terms(factors: BottleneckFactors) -> Tensor:
    """What each of the R channels between sees of a patch: (R, C*k)."""
    return (factors.reduce.T[:, :, None] * factors.filters[:, None]).flatten(1)


def calibrate(
    problem: LeastSquares, start: BottleneckFactors, sweeps: int, dtype: torch.dtype = torch.float64
) -> BottleneckFactors:
    """From a decomposition of the weights: least squares, then rounds while they pay.

    Args:
        sweeps: rounds at most.
        dtype: in which products with the second moments are computed.
    """
    fit = _Fit(problem, problem.xx.to(dtype), start)
    error = fit.solve_expand()
    for _ in range(sweeps):
        before = error
        fit.improve()
        error = fit.solve_expand()
        if error > (1 - GAIN) * before:
            break
    return fit.factors
