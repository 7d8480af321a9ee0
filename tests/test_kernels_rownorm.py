"""Rows of one mean and deviation, or of one length: right for every size and layout, and nothing written beside."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from kernel_checks import poisoned
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.kernels import backends, case
from sepconv.kernels.case import Outline
from sepconv.kernels.halide.conv import rownorm
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
EPS = torch.finfo(torch.float32).eps


class RowsOf(NamedTuple):
    """``cut``: numbers beside each row, on both sides."""

    name: str
    shape: tuple[int, ...]
    cut: int = 0


ROWS = [
    RowsOf("below_vector", (2, 5, 7, 3)),
    RowsOf("one_number", (5, 1)),
    RowsOf("vector", (2, 5, 7, 16)),
    RowsOf("above_vector", (3, 5, 17)),
    RowsOf("prime", (2, 5, 7, 97)),
    RowsOf("cut_from_wider", (2, 5, 7, 33), 8),
    RowsOf("one_row", (1, 1, 257)),
    RowsOf("many_rows", (1031, 24)),
]


@pytest.mark.parametrize("kind", ["layer", "length"])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: rows.name)
def test_rows(rows: RowsOf, kind: str) -> None:
    torch.manual_seed(0)
    length = rows.shape[-1]
    # Means far from 0: sums of squares would lose what is left.
    whole = torch.randn(*rows.shape[:-1], length + 2 * rows.cut) + 30
    x, weight, bias = whole[..., rows.cut : rows.cut + length], torch.rand(length), torch.randn(length)
    out, check = poisoned(torch.empty(rows.shape))
    known = case.row_norm(x, out, kind, 1e-5).into(out)
    assert backends.choose(known).backend.name == "halide"
    found = rownorm.plan(known)
    rownorm.bind(found, x, rownorm.pack(found, [weight, bias]), None, out)()
    truth, allowed = expected(x.double(), weight.double(), bias.double(), kind)
    assert bool(((out - truth).abs() <= allowed).all())
    check()


def expected(x: Tensor, weight: Tensor, bias: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The truth, and how far from it the roundings of the numbers and of the mean may lead."""
    terms = x.shape[-1] / machine.host().lanes + 8
    if kind == "length":
        truth = F.normalize(x, dim=-1, eps=1e-5)
        return truth, terms * EPS * truth.abs()
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    truth = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    size = (1 + (x.abs().amax(-1, keepdim=True)) / deviation) * weight + bias.abs()
    return truth, terms * EPS * size


def test_threads_share_rows(threads: int) -> None:
    x = torch.randn(3, 7, 24)
    out = torch.full_like(x, torch.nan)
    known = case.row_norm(x, out, "layer", 1e-5).into(out)
    assert known.threads == threads
    found = rownorm.plan(known)
    rownorm.bind(found, x, rownorm.pack(found, [None, None]), None, out)()
    torch.testing.assert_close(out, F.layer_norm(x, (24,), eps=1e-5))


def test_lengths_of_zero_and_numbers_that_are_none() -> None:
    x = torch.zeros(3, 17)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = rownorm.prepare(case.row_norm(x, torch.empty_like(x), "length", 1e-6))(x)
    torch.testing.assert_close(y, F.normalize(x, dim=-1, eps=1e-6), equal_nan=True)
    z = rownorm.prepare(case.row_norm(x, torch.empty_like(x), "layer", 1e-6))(x)
    torch.testing.assert_close(z, F.layer_norm(x, (17,), eps=1e-6), equal_nan=True)


def test_refusals() -> None:
    x = Outline.contiguous_of((2, 5, 7))
    assert "side by side" in rownorm.supports(case.row_norm(Outline((2, 5, 7), (35, 1, 5)), x, "layer", 1e-5))
    assert "empty" in rownorm.supports(case.row_norm(x, Outline.contiguous_of((0, 7)), "layer", 1e-5))
    assert "float32" in rownorm.supports(case.row_norm(x.to(torch.float64), x, "layer", 1e-5))
    apart = Outline((2, 3, 4, 5, 7), (9999, 1500, 200, 17, 1))
    assert "4 dimensions" in rownorm.supports(case.row_norm(apart, apart, "layer", 1e-5))
    assert rownorm.describe(case.row_norm(x, x, "layer", 1e-5))["rows"] == (1, 1, 10, 7)


def test_functions_leave_them_to_pytorch() -> None:
    x = torch.randn(3, 17)
    for kind, truth in (("layer", F.layer_norm(x, (17,), eps=1e-5)), ("length", F.normalize(x, dim=-1, eps=1e-5))):
        choice = backends.choose(case.row_norm(x, x, kind, 1e-5))
        assert choice.backend.name == "torch"
        torch.testing.assert_close(choice(x, None, None), truth)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation (arXiv:2301.00808) over images of either layout."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.pixels, self.channels = ((1, 2), 3) if channels_last else ((2, 3), 1)
        size = (17,) if channels_last else (17, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(p=2, dim=self.pixels, keepdim=True)
        relative = length / (length.mean(dim=self.channels, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias, self.weight, x * relative)


class UnitVectors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.flatten(2).transpose(1, 2), dim=-1)


KINDS = {
    "pixels": (lambda: nn.Sequential(nn.Conv2d(17, 17, 1), LayerNorm2d(17)), ["pointwise", "row_norm"]),
    "pixels_alone": (lambda: LayerNorm2d(17), ["row_norm"]),
    "without_weight": (lambda: nn.LayerNorm(11, elementwise_affine=False), ["row_norm"]),
    "response": (lambda: ResponseNorm(False), ["pool", "pool", *["elementwise"] * 3]),
    "units": (UnitVectors, ["row_norm"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_networks_have_groups_of_them(name: str) -> None:
    torch.manual_seed(0)
    make, kinds = KINDS[name]
    model, x = make().eval(), torch.randn(2, 17, 7, 11)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    found = [group for group in fast.explain().groups if group.kind not in ("copy", "aten.mean.dim")]
    assert ([group.kind for group in found], {group.kernel for group in found}) == (kinds, {"halide"})


def test_response_of_channels_last() -> None:
    torch.manual_seed(0)
    model, x = ResponseNorm(True).eval(), torch.randn(2, 7, 11, 17)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert [group.kind for group in fast.explain().groups].count("pool") == 2


def test_means_over_other_dimensions_are_pytorchs() -> None:
    class Means(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x.mean(1, keepdim=True), x.mean((1, 2)), x.norm(p=1, dim=(2, 3)), x.norm(dim=1), x.mean((2, 3))]

    model, x = Means().eval(), torch.randn(2, 5, 7, 3)
    fast = compile(model, x)
    for got, truth in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(got, truth)
    kinds = [group.kind for group in fast.explain().groups if group.kind != "copy"]
    assert kinds.count("pool") == 2
