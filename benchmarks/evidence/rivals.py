"""What a convolution may be replaced by instead: pointwise before depthwise, Tucker, CP. Data-free, in a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.convert.forms.separable import balance, truncated_svd
from sepconv.convert.images import CalibrationImages
from sepconv.convert.moments import Moments, pixels_per_image
from sepconv.convert.passes import calls
from sepconv.convert.problem import LeastSquares

SWEEPS = 60
"""Alternating least squares of CP and Tucker, which start from singular vectors."""

Fitted = tuple[Tensor, Tensor]


def convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """The 3x3 convolutions in the order of their names, which is the order they run in the networks here."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def separable_weights(conv: nn.Conv2d, depth_multiplier: int) -> int:
    return depth_multiplier * conv.in_channels * (9 + conv.out_channels)


def replaced(model: nn.Module, make: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """A copy of the model with another module in the place of every 3x3 convolution."""
    new = copy.deepcopy(model)
    for name, conv in convolutions(model):
        _put(new, name, make(conv))
    return new.eval()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.to(memory_format=torch.channels_last))


def _conv(weight: Tensor, like: nn.Conv2d, groups: int = 1, bias: Tensor | None = None) -> nn.Conv2d:
    """A convolution of given weights; the spatial one takes over the padding of `like` (all here have stride 1)."""
    spatial = weight.shape[-1] > 1
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    padding = like.padding if spatial else 0
    layer = nn.Conv2d(inputs, outputs, weight.shape[2:], 1, padding, groups=groups, bias=bias is not None)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    return layer


def depthwise_first_svd(conv: nn.Conv2d, multiplier: int) -> nn.Module:
    """Closed form: per input channel the truncated singular value decomposition of its (O, k) slice."""
    filters, columns = balance(*truncated_svd(conv.weight.detach().double(), multiplier))
    inputs, outputs = conv.in_channels, conv.out_channels
    depthwise = _conv(filters.reshape(inputs * multiplier, 1, *conv.kernel_size), conv, inputs)
    return nn.Sequential(depthwise, _conv(columns.reshape(outputs, inputs * multiplier, 1, 1), conv))


def pointwise_first(conv: nn.Conv2d, filters: Tensor, columns: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Pointwise, then depthwise: filters (O, M, k), columns (O, M, C)."""
    outputs, multiplier, _ = filters.shape
    pointwise = _conv(columns.reshape(outputs * multiplier, -1, 1, 1), conv)
    return nn.Sequential(pointwise, _conv(filters.view(outputs, multiplier, *conv.kernel_size), conv, outputs, bias))


def pointwise_first_svd(conv: nn.Conv2d, multiplier: int) -> nn.Module:
    """Closed form: per output channel the truncated singular value decomposition of its (k, C) slice."""
    slices = conv.weight.detach().double().flatten(2).transpose(1, 2)
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)
    root = s[:, None, :multiplier].sqrt()
    filters = (u[..., :multiplier] * root).transpose(1, 2)
    return pointwise_first(conv, filters, vh[:, :multiplier] * root.transpose(1, 2))


def pointwise_first_fitted(conv: nn.Conv2d, problem: LeastSquares, multiplier: int, sweeps: int) -> Fitted:
    """Alternating least squares on the patches, each output channel on its own."""
    channels, taps = problem.channels, problem.taps
    xx = problem.xx.view(channels, taps, channels, taps)
    start = pointwise_first_svd(conv, multiplier)
    columns = start[0].weight.detach().double().view(-1, multiplier, channels)  # type: ignore[index, union-attr, operator]
    filters = start[1].weight.detach().double().flatten(2)  # type: ignore[index, union-attr, operator]
    for output, yx in enumerate(problem.yx.view(-1, channels, taps)):
        f, c = filters[output], columns[output]
        for _ in range(sweeps):
            gram = torch.einsum("mi,cidj,nj->mcnd", f, xx, f).reshape(multiplier * channels, -1)
            c = _solve(gram, (f @ yx.T).flatten()).view(multiplier, channels)
            gram = torch.einsum("mc,cidj,nd->minj", c, xx, c).reshape(multiplier * taps, -1)
            f = _solve(gram, (c @ yx).flatten()).view(multiplier, taps)
        filters[output], columns[output] = f, c
    return filters, columns


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    gram = scale[:, None] * gram * scale
    gram.diagonal().add_(1e-9)
    return torch.cholesky_solve((right * scale)[:, None], torch.linalg.cholesky(gram))[:, 0] * scale


def pointwise_first_sequential(model: nn.Module, calibration: Tensor, multiplier: int, sweeps: int = 2) -> nn.Module:
    """Every layer fitted to the original's output on the converted network's input, as `sepconv.convert` does."""
    old, new = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    images = CalibrationImages(calibration, calibration.device, calibration.dtype)
    generator = torch.Generator().manual_seed(0)
    for name, conv in convolutions(model):
        mine: Any = new.get_submodule(name)
        moments = Moments(mine)
        pixels = pixels_per_image(moments, images.count)
        for x in images.batches():
            (inputs, outputs), (_, target) = calls(new, mine, x, 1)[0], calls(old, old.get_submodule(name), x, 1)[0]
            moments.add(inputs, outputs, target, pixels, generator)
        problem = moments.problem(torch.eye(conv.out_channels, dtype=torch.float64), 1e-3)
        filters, columns = pointwise_first_fitted(conv, problem, multiplier, sweeps)
        weight = torch.einsum("omk,omc->ock", filters, columns)
        _put(new, name, pointwise_first(conv, filters, columns, moments.bias(weight)))
    return new


def tucker(conv: nn.Conv2d, weights: int) -> nn.Module:
    """1x1, kxk, 1x1 with at most `weights` weights, ranks in proportion to the channels; orthogonal iteration.

    Reference: Kim et al. 2016, arXiv:1511.06530.
    """
    tensor = conv.weight.detach().double().flatten(2)
    outputs, inputs, taps = tensor.shape

    def cost(share: float) -> float:
        a, b = max(1, int(share * outputs)), max(1, int(share * inputs))
        return a * outputs + b * inputs + a * b * taps

    share = max(s / 1000 for s in range(1, 1001) if s == 1 or cost(s / 1000) <= weights)
    a, b = max(1, int(share * outputs)), max(1, int(share * inputs))
    right = torch.linalg.svd(tensor.transpose(0, 1).flatten(1), full_matrices=False).U[:, :b]
    for _ in range(SWEEPS):
        left = torch.linalg.svd(torch.einsum("ock,cb->obk", tensor, right).flatten(1), full_matrices=False).U[:, :a]
        inner = torch.einsum("ock,oa->cak", tensor, left).flatten(1)
        right = torch.linalg.svd(inner, full_matrices=False).U[:, :b]
    core = torch.einsum("ock,oa,cb->abk", tensor, left, right).view(a, b, *conv.kernel_size)
    first, last = right.T.reshape(b, inputs, 1, 1), left.view(outputs, a, 1, 1)
    return nn.Sequential(_conv(first, conv), _conv(core, conv), _conv(last, conv))


def canonical(conv: nn.Conv2d, weights: int) -> nn.Module:
    """CP: 1x1, depthwise kxk, 1x1 with at most `weights` weights; alternating least squares.

    Reference: Lebedev et al. 2015, arXiv:1412.6553.
    """
    tensor = conv.weight.detach().double().flatten(2)
    outputs, inputs, taps = tensor.shape
    rank = max(1, weights // (outputs + inputs + taps))
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in tensor.shape)
    for _ in range(SWEEPS):
        a = _factor(torch.einsum("ock,cr,kr->or", tensor, b, c), b, c)
        b = _factor(torch.einsum("ock,or,kr->cr", tensor, a, c), a, c)
        c = _factor(torch.einsum("ock,or,cr->kr", tensor, a, b), a, b)
    # Equal norms of the three factors of each term, so that training moves them alike.
    norms = [factor.norm(dim=0).clamp_min(1e-12) for factor in (a, b, c)]
    mean = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    a, b, c = (factor / norm * mean for factor, norm in zip((a, b, c), norms, strict=True))
    first, last = b.T.reshape(rank, inputs, 1, 1), a.reshape(outputs, rank, 1, 1)
    return nn.Sequential(
        _conv(first, conv), _conv(c.T.reshape(rank, 1, *conv.kernel_size), conv, rank), _conv(last, conv)
    )


def _factor(right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gram = (a.T @ a) * (b.T @ b)
    gram.diagonal().add_(1e-8 * gram.diagonal().mean())
    return torch.linalg.solve(gram, right, left=False)
