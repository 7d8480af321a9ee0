"""Pointwise, depthwise, pointwise: R channels between, with one filter each, like MobileNet v2's block without norms.

Such a layer amounts to a normal convolution W[o, c, k] = sum over r of A[o, r] B[c, r] T[r, k], a canonical polyadic
(CP) decomposition of rank R (Lebedev et al. 2015, arXiv:1412.6553). A depthwise layer with M filters a channel and a
pointwise one are the special case of R = C*M terms that see one input channel each; a term that sees all is worth more.

:func:`decompose` looks at the weights alone: alternating least squares. :func:`calibrate` goes on with the patches that
a layer really sees, as that of the separable form does (ours). Neither finds a global optimum; no step of either raises
the error. Large products are in the precision of the weights, the factors and what they are solved from in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.forms import separable
from sepconv.convert.forms.bottleneck_fit import BottleneckFactors, calibrate, jitter, solve
from sepconv.convert.forms.curve import spread
from sepconv.convert.forms.form import relative_error
from sepconv.convert.problem import LeastSquares
from sepconv.convert.replace import Pointwise, SeparableLayer, empty_pointwise, empty_separable, fill, like

SHARES = tuple(2 / 3 * 16 ** (-step / 14) for step in range(15))
"""Parts of a convolution's weights that its bottleneck may have: from two thirds to a 24th, each a fifth less."""

SWEEPS = 30
"""Rounds of alternating least squares on the weights."""

TRIALS = 3
"""Ranks of a layer that are fitted before ranks are chosen."""

BRIEF_SWEEPS = 8
"""Rounds for a trial, whose error only has to compare with others."""


def compose(factors: BottleneckFactors) -> Tensor:
    """The normal convolution that the three layers amount to: (O, C, k)."""
    expand, reduce, filters = factors
    # Tap by tap: the products of both pointwise layers for all pairs of channels would be R/k times the result.
    return ((filters.T[:, None] * expand) @ reduce.T).permute(1, 2, 0).contiguous()


def decompose(weight: Tensor, rank: int, scale: Tensor | None = None, sweeps: int = SWEEPS) -> BottleneckFactors:
    """The bottleneck of the weights alone.

    Args:
        weight: its precision is that of large products.
        scale: what each output channel is multiplied with afterwards; its square weighs the error of that channel.

    Shape:
        weight: (O, C, k), scale: (O,)
    """
    weighed = weight if scale is None else weight * scale[:, None, None].to(weight)
    generator = torch.Generator().manual_seed(0)
    expand, reduce, filters = (torch.randn(n, rank, generator=generator).to(weight) for n in weight.shape)
    taps_first = weighed.transpose(1, 2).contiguous()
    for _ in range(sweeps):
        expand = _factor(((taps_first @ reduce) * filters).sum(1), reduce, filters)
        # What both of the others need is computed once: no product of two factors is ever held whole.
        seen = _over_outputs(weighed, expand)
        reduce = _factor((seen * filters).sum(1), expand, filters)
        filters = _factor((seen * reduce[:, None]).sum(0), expand, reduce)
    # Outputs of scale 0 get their best answer too.
    expand = _factor(((weight.transpose(1, 2) @ reduce) * filters).sum(1), reduce, filters)
    return BottleneckFactors(expand.double(), reduce.double(), filters.T.double())


def _over_outputs(weight: Tensor, expand: Tensor) -> Tensor:
    """Sums over the output channels: (O, C, k), (O, R) -> (C, k, R)."""
    return (weight.flatten(1).T @ expand).view(*weight.shape[1:], -1)


def _factor(products: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The factor of one dimension that is best for those of the other two.

    Shape:
        products: (n, R), of the weight with the terms of the others; first: (a, R), second: (b, R)    ->    (n, R)
    """
    gram = (first.T @ first) * (second.T @ second)
    return solve(gram.double(), products.T.double(), jitter(products.dtype)).T.to(products)


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
    trial_sweeps: ClassVar[int] = 1

    def ranks(self, conv: _ConvNd) -> list[int]:
        """Those that take certain parts of the convolution's weights."""
        whole, one = conv.weight.numel(), weights(conv, 1)
        return sorted({max(1, min(most(conv), int(share * whole / one))) for share in SHARES})

    def trials(self, ranks: Sequence[int]) -> list[int]:
        return spread(ranks, TRIALS)

    def of_multiplier(self, conv: _ConvNd, depth_multiplier: int) -> int:
        return max(1, min(most(conv), separable.weights(conv, depth_multiplier) // weights(conv, 1)))

    def weights(self, conv: _ConvNd, rank: int) -> int:
        return weights(conv, rank)

    def macs(self, conv: _ConvNd, rank: int, inputs: int, outputs: int) -> int:
        """The first layer works at the input's resolution, the others at the output's."""
        return weights(conv, rank) * outputs + rank * conv.in_channels * (inputs - outputs)

    def start(self, weight: Tensor, rank: int, scale: Tensor | None, brief: bool = False) -> BottleneckFactors:
        return decompose(weight.flatten(2), rank, scale, BRIEF_SWEEPS if brief else SWEEPS)

    def dropped(self, weight: Tensor, ranks: Sequence[int], scale: Tensor | None) -> list[float]:
        return [relative_error(weight, compose(self.start(weight, rank, scale)), scale) for rank in ranks]

    def fit(self, problem: LeastSquares, weight: Tensor, start: BottleneckFactors, sweeps: int) -> BottleneckFactors:
        return calibrate(problem, start, sweeps, weight.dtype)

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
