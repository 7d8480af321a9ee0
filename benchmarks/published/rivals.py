"""CP and Tucker decompositions in the norm of what a layer sees, to compare with.

Kalle et al. 2025 (arXiv:2511.04494) decompose a convolution's weights so that the squared error is weighted by the
covariance of its patches. Here tensorly's plain decomposition is where the factors start, and L-BFGS takes the weighted
error to its minimum. Every layer is weighed by what it sees in the original network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS = 20_000
"""Patches from which a covariance is estimated."""
STEPS = 300

Build = Callable[[nn.Conv2d, Tensor, int], nn.Module]


@torch.no_grad()
def covariances(model: nn.Module, names: list[str], inputs: Tensor) -> dict[str, Tensor]:
    """By layer (C * k, C * k): the mean products of its patches."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Callable[..., None]:
        def look(conv: nn.Conv2d, given: tuple[Tensor]) -> None:
            patches = F.unfold(given[0], conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
            rows = patches.transpose(1, 2).flatten(0, 1)
            some = torch.randperm(len(rows), generator=generator)[: max(1, PIXELS // len(inputs)) * len(given[0])]
            seen[name].append(rows[some])

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for part in inputs.split(8):
        model(part)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: found.T @ found / len(found) for name, found in rows.items()}


def fitted(weight: Tensor, covariance: Tensor, start: list[Tensor], compose: Callable[..., Tensor]) -> list[Tensor]:
    """Factors whose product (O, C, k) has the least error on the patches."""
    factors = [factor.contiguous().clone().requires_grad_() for factor in start]
    optimizer = torch.optim.LBFGS(factors, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")
    scale = torch.einsum("oi,ij,oj->", weight.flatten(1), covariance, weight.flatten(1))

    def error() -> Tensor:
        optimizer.zero_grad()
        rest = (weight - compose(*factors)).flatten(1)
        found = ((rest @ covariance) * rest).sum() / scale
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(error)  # type: ignore[arg-type]
    return [factor.detach() for factor in factors]


def cp(conv: nn.Conv2d, covariance: Tensor, weights: int) -> nn.Module:
    """1x1, depthwise kxk, 1x1."""
    from tensorly.decomposition import parafac

    weight = conv.weight.detach().double().flatten(2)
    rank = max(1, weights // sum(weight.shape))
    start = parafac(weight.numpy(), rank, n_iter_max=100, init="random", random_state=0).factors
    factors = fitted(
        weight, covariance, [torch.from_numpy(f) for f in start], lambda a, b, c: torch.einsum("or,cr,kr->ock", a, b, c)
    )
    a, b, c = factors
    middle = c.T.reshape(rank, 1, *conv.kernel_size)
    return _layers(conv, b.T[:, :, None, None], middle, a[:, :, None, None], groups=rank)


def tucker(conv: nn.Conv2d, covariance: Tensor, weights: int) -> nn.Module:
    """1x1, kxk, 1x1, ranks in proportion to the channels."""
    from tensorly.decomposition import partial_tucker

    weight = conv.weight.detach().double().flatten(2)
    outputs, inputs, taps = weight.shape

    def ranks(share: float) -> tuple[int, int]:
        return max(1, int(share * outputs)), max(1, int(share * inputs))

    def cost(a: int, b: int) -> int:
        return a * outputs + b * inputs + a * b * taps

    share = max(s / 1000 for s in range(1, 1001) if s == 1 or cost(*ranks(s / 1000)) <= weights)
    a, b = ranks(share)
    (core, (left, right)), _ = partial_tucker(weight.numpy(), rank=[a, b], modes=[0, 1])
    start = [torch.from_numpy(part.copy()) for part in (core, left, right)]
    core, left, right = fitted(weight, covariance, start, lambda g, u, v: torch.einsum("abk,oa,cb->ock", g, u, v))
    middle = core.reshape(a, b, *conv.kernel_size)
    return _layers(conv, right.T[:, :, None, None], middle, left[:, :, None, None])


def _layers(conv: nn.Conv2d, first: Tensor, middle: Tensor, last: Tensor, groups: int = 1) -> nn.Module:
    """Three convolutions of these weights; the one in the middle has the strides of ``conv``, the last its bias."""
    reduce = nn.Conv2d(first.shape[1], first.shape[0], 1, bias=False)
    spatial = nn.Conv2d(
        first.shape[0],
        middle.shape[0],
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        groups,
        bias=False,  # type: ignore[arg-type]
    )
    expand = nn.Conv2d(last.shape[1], last.shape[0], 1, bias=conv.bias is not None)
    with torch.no_grad():
        for layer, weight in ((reduce, first), (spatial, middle), (expand, last)):
            layer.weight.copy_(weight)
        if conv.bias is not None and expand.bias is not None:
            expand.bias.copy_(conv.bias)
    return nn.Sequential(reduce, spatial, expand)


RIVALS: dict[str, Build] = {"CP, weighted": cp, "Tucker, weighted": tucker}


def replaced(model: nn.Module, inputs: Tensor, weights: Mapping[str, int], build: Build) -> nn.Module:
    """A copy of the model with so many weights in each of the named convolutions."""
    new = copy.deepcopy(model)
    found = covariances(model, list(weights), inputs)
    for name, count in weights.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        parent, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(parent), leaf, build(conv, found[name], count))
    return new.eval()
