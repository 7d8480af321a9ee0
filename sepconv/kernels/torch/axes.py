"""PyTorch's reductions, softmax and choosing of numbers behind the signatures of our kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sepconv.kernels.axes import GatherDetail, ReduceDetail
from sepconv.kernels.case import Case
from sepconv.kernels.torch.prepared import in_float32

_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "amax": torch.amax,
    "amin": torch.amin,
}
_SOFTMAXES: dict[str, Callable[..., Tensor]] = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}


def reduced(x: Tensor, detail: ReduceDetail, keepdim: bool) -> Tensor:
    return _REDUCTIONS[detail.what](x, dim=detail.dims, keepdim=keepdim)


def softmaxed(x: Tensor, kind: str) -> Tensor:
    return _SOFTMAXES[kind](x, dim=-1)


def gathered(x: Tensor, detail: GatherDetail) -> Tensor:
    """Dimension after dimension."""
    for d, places in enumerate(detail.places):
        if places is not None:
            x = _along(x, d, places, detail.value)
    return x


def _along(x: Tensor, d: int, places: Sequence[int], value: float) -> Tensor:
    at = torch.tensor(places)
    found = x.index_select(d, at.clamp_min(0))
    outside = (at < 0).view([-1 if i == d else 1 for i in range(x.dim())])
    return found.masked_fill(outside, value) if bool(outside.any()) else found


def reduce(case: Case) -> Callable[..., Tensor]:
    detail, keepdim = case.detail, len(case.y.shape) == len(case.x.shape)
    assert isinstance(detail, ReduceDetail)
    return in_float32(case, lambda x: reduced(x, detail, keepdim))


def softmax(case: Case) -> Callable[..., Tensor]:
    kind = str(case.detail)
    return in_float32(case, lambda x: softmaxed(x, kind))


def product(case: Case) -> Callable[..., Tensor]:
    return in_float32(case, torch.bmm)


def gather(case: Case) -> Callable[..., Tensor]:
    detail = case.detail
    assert isinstance(detail, GatherDetail)
    return in_float32(case, lambda x: gathered(x, detail), moves=detail.moves)
