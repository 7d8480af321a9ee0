"""Pointwise, depthwise, pointwise: R channels between, with one filter each, like MobileNet v2's block without norms.

Such a layer amounts to a normal convolution W[o, c, k] = sum over r of A[o, r] B[c, r] T[r, k], a canonical polyadic
(CP) decomposition of rank R (Lebedev et al. 2015, arXiv:1412.6553). A depthwise layer with M filters a channel and a
pointwise one are the special case of R = C*M terms that see one input channel each; a term that sees all is worth more.

:func:`decompose` looks at the weights alone: alternating least squares. :func:`calibrate` goes on with the patches that
a layer really sees, as that of the separable form does (ours). Neither finds a global optimum; each step solves its
block exactly. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.forms import separable
from sepconv.convert.forms.form import relative_error
from sepconv.convert.problem import LeastSquares
from sepconv.convert.replace import Pointwise, SeparableLayer, empty_pointwise, empty_separable, fill, like

SHARES = (1 / 24, 1 / 16, 1 / 12, 1 / 10, 1 / 8, 1 / 6.5, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
"""Parts of a convolution's weights that its bottleneck is tried with."""

SWEEPS = 30
"""Rounds of alternating least squares on the weights."""

READ = 5e11
"""Bytes that the sweeps of one layer may read, about a minute: each term reads the second moments twice."""

_JITTER = 1e-9
"""On the unit diagonals of `_solve`: keeps systems of dependent terms defined."""


class BottleneckFactors(NamedTuple):
    """What a bottleneck is made of.

    Shape:
        expand: (O, R), the last pointwise layer    reduce: (C, R), the first    filters: (R, k)
    """

    expand: Tensor
    reduce: Tensor
    filters: Tensor


def compose(factors: BottleneckFactors) -> Tensor:
    """The normal convolution that the three layers amount to: (O, C, k)."""
    expand, reduce, filters = factors
    # Tap by tap: the products of both pointwise layers for all pairs of channels would be R/k times the result.
    return ((filters.T[:, None] * expand) @ reduce.T).permute(1, 2, 0).contiguous()


def decompose(weight: Tensor, rank: int, scale: Tensor | None = None) -> BottleneckFactors:
    """The bottleneck of the weights alone.

    Args:
        scale: what each output channel is multiplied with afterwards; its square weighs the error of that channel.

    Shape:
        weight: (O, C, k), scale: (O,)
    """
    weighed = weight if scale is None else weight * scale[:, None, None]
    generator = torch.Generator().manual_seed(0)
    expand, reduce, filters = (torch.randn(n, rank, generator=generator).to(weight) for n in weight.shape)
    taps_first = weighed.transpose(1, 2).contiguous()
    for _ in range(SWEEPS):
        expand = _factor(((taps_first @ reduce) * filters).sum(1), reduce, filters)
        # What both of the others need is computed once: no product of two factors is ever held whole.
        seen = _over_outputs(weighed, expand)
        reduce = _factor((seen * filters).sum(1), expand, filters)
        filters = _factor((seen * reduce[:, None]).sum(0), expand, reduce)
    # Outputs of scale 0 get their best answer too.
    expand = _factor(((weight.transpose(1, 2) @ reduce) * filters).sum(1), reduce, filters)
    return BottleneckFactors(expand, reduce, filters.T)


def _over_outputs(weight: Tensor, expand: Tensor) -> Tensor:
    """Sums over the output channels: (O, C, k), (O, R) -> (C, k, R)."""
    return (weight.flatten(1).T @ expand).view(*weight.shape[1:], -1)


def _factor(products: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The factor of one dimension that is best for those of the other two.

    Shape:
        products: (n, R), of the weight with the terms of the others; first: (a, R), second: (b, R)    ->    (n, R)
    """
    return _solve((first.T @ first) * (second.T @ second), products.T).T


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 right, scaled to a unit diagonal."""
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    gram = scale[:, None] * gram * scale
    gram.diagonal().add_(_JITTER)
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * right, torch.linalg.cholesky(gram))


def _terms(factors: BottleneckFactors) -> Tensor:
    """What each of the R channels between sees of a patch: (R, C*k)."""
    return (factors.reduce.T[:, :, None] * factors.filters[:, None]).flatten(1)


def solve_expand(problem: LeastSquares, factors: BottleneckFactors) -> BottleneckFactors:
    """The last pointwise layer by least squares over all R channels at once."""
    terms = _terms(factors)
    seen = terms @ problem.xx
    return factors._replace(expand=_solve(seen @ terms.T, terms @ problem.yx.T).T)


def sweep(problem: LeastSquares, factors: BottleneckFactors) -> BottleneckFactors:
    """Improve what each of the R channels sees, one after the other, each against what all the others leave over.

    In the metric G of the outputs the best term f for a column a is the one nearest, on the patches, to what the
    gradient a^T G (yx - sum of the others) asks for; its two factors are solved for in turn.
    """
    c, k = problem.channels, problem.taps
    expand, reduce, filters = factors.expand, factors.reduce.clone(), factors.filters.clone()
    terms = _terms(factors)
    seen = terms @ problem.xx
    weighed = problem.metric @ expand
    products, wanted = expand.T @ weighed, weighed.T @ problem.yx
    rows = problem.xx.view(c, k * c * k)
    for r in range(len(filters)):
        own = products[r, r].clamp_min(1e-300)
        target = ((wanted[r] - products[r] @ seen) / own + seen[r]).view(c, k)
        if not bool(target.any()):
            continue
        by_filter = (problem.xx.view(c * k * c, k) @ filters[r]).view(c, k, c)
        gram = torch.einsum("ckd,k->cd", by_filter, filters[r])
        reduce[:, r] = _solve(gram, (target @ filters[r])[:, None])[:, 0]
        by_channel = (reduce[:, r] @ rows).view(k, c * k)
        gram = torch.einsum("kdl,d->kl", by_channel.view(k, c, k), reduce[:, r])
        filters[r] = _solve(gram, (reduce[:, r] @ target)[:, None])[:, 0]
        seen[r] = filters[r] @ by_channel
    return BottleneckFactors(expand, reduce, filters)


def calibrate(problem: LeastSquares, start: BottleneckFactors, sweeps: int) -> BottleneckFactors:
    """From a decomposition of the weights: least squares, then rounds of sweep and least squares."""
    factors = solve_expand(problem, start)
    for _ in range(min(sweeps, affordable(problem.xx.shape[0], len(start.filters)))):
        factors = solve_expand(problem, sweep(problem, factors))
    return factors


def affordable(values: int, rank: int) -> int:
    """Sweeps of a layer of so many values in a patch."""
    return int(READ / (rank * values**2 * 2 * 8))


def balance(factors: BottleneckFactors) -> BottleneckFactors:
    """Give the three factors of each term the same norm, which leaves their product as it was."""
    norms = [factor.norm(dim=dim).clamp_min(1e-300) for factor, dim in zip(factors, (0, 0, 1), strict=True)]
    mean = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    expand, reduce, filters = factors
    return BottleneckFactors(
        expand * (mean / norms[0]), reduce * (mean / norms[1]), filters * (mean / norms[2])[:, None]
    )


def weights(conv: _ConvNd, rank: int) -> int:
    """Those of the bottleneck in the place of a convolution."""
    return rank * (conv.in_channels + conv.weight[0, 0].numel() + conv.out_channels)


def most(conv: _ConvNd) -> int:
    """Channels that are enough for any weight of this shape."""
    outputs, channels, taps = conv.out_channels, conv.in_channels, conv.weight[0, 0].numel()
    return min(outputs * channels, outputs * taps, channels * taps)


def layers(conv: _ConvNd, rank: int, has_bias: bool = False) -> tuple[Pointwise, SeparableLayer]:
    """A pointwise layer to R channels and a separable one; the weights are yet to be set.

    The first has no bias, so that a padding of zeros stays one.
    """
    return empty_pointwise(conv, rank), empty_separable(conv, rank, 1, has_bias)


class BottleneckForm:
    """Its rank is the number of channels inside."""

    name: ClassVar[str] = "bottleneck"
    trial_sweeps: ClassVar[int] = 0

    def ranks(self, conv: _ConvNd) -> list[int]:
        """Those that take certain parts of the convolution's weights."""
        whole, one = conv.weight.numel(), weights(conv, 1)
        return sorted({max(1, min(most(conv), int(share * whole / one))) for share in SHARES})

    def of_multiplier(self, conv: _ConvNd, depth_multiplier: int) -> int:
        return max(1, min(most(conv), separable.weights(conv, depth_multiplier) // weights(conv, 1)))

    def weights(self, conv: _ConvNd, rank: int) -> int:
        return weights(conv, rank)

    def macs(self, conv: _ConvNd, rank: int, inputs: int, outputs: int) -> int:
        """The first layer works at the input's resolution, the others at the output's."""
        return weights(conv, rank) * outputs + rank * conv.in_channels * (inputs - outputs)

    def start(self, weight: Tensor, rank: int, scale: Tensor | None) -> BottleneckFactors:
        return decompose(weight.flatten(2), rank, scale)

    def dropped(self, weight: Tensor, ranks: Sequence[int], scale: Tensor | None) -> list[float]:
        return [relative_error(weight, compose(self.start(weight, rank, scale)), scale) for rank in ranks]

    def fit(self, problem: LeastSquares, weight: Tensor, start: BottleneckFactors, sweeps: int) -> BottleneckFactors:
        return calibrate(problem, start, sweeps)

    def compose(self, factors: BottleneckFactors) -> Tensor:
        return compose(factors)

    def layer(self, conv: _ConvNd, factors: BottleneckFactors, shift: Tensor | None = None) -> nn.Module:
        expand, reduce, filters = balance(factors)
        first, second = layers(conv, len(filters), has_bias=shift is not None)
        with torch.no_grad():
            first.weight.copy_(reduce.T.reshape(first.weight.shape))
        fill(second, filters, expand, conv, shift)
        return like(conv, nn.Sequential(first, second))

    def empty(self, conv: _ConvNd, rank: int) -> nn.Module:
        return nn.Sequential(*layers(conv, rank)).train(conv.training)
