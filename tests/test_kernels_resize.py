"""Images of another size are PyTorch's, for every mode, scale and alignment, and nothing is written beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import image, poisoned
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.kernels import backends, case
from sepconv.kernels.case import Outline, ResizeDetail
from sepconv.kernels.halide.conv import resize
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
EPS = torch.finfo(torch.float32).eps

SIZES = {
    "twice": ((2, 17, 5, 7), (10, 14)),
    "odd_scale": ((1, 16, 5, 7), (13, 11)),
    "smaller": ((2, 33, 11, 13), (5, 4)),
    "few_channels": ((2, 3, 5, 7), (9, 15)),
    "one_pixel": ((1, 19, 1, 1), (4, 3)),
    "to_one_pixel": ((1, 19, 5, 4), (1, 1)),
    "the_same": ((1, 17, 5, 7), (5, 7)),
}


def details() -> list[ResizeDetail]:
    found = [ResizeDetail(mode, False, (None, None)) for mode in resize.MODES]
    return found + [ResizeDetail(mode, True, (None, None)) for mode in ("bilinear", "bicubic")]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("detail", details(), ids=lambda detail: f"{detail.mode}{'_aligned' * detail.align_corners}")
def test_every_mode_is_pytorchs(name: str, detail: ResizeDetail) -> None:
    torch.manual_seed(0)
    shape, size = SIZES[name]
    x = image(shape, channels_last=True)
    like = torch.empty(*shape[:2], *size).contiguous(memory_format=torch.channels_last)
    out, check = poisoned(like)
    known = case.resize(x, out, detail).into(out)
    assert backends.choose(known).backend.name == "halide"
    found = resize.plan(known)
    resize.bind(found, x, resize.pack(found, ()), None, out)()
    options: dict[str, Any] = {} if "nearest" in detail.mode else {"align_corners": detail.align_corners}
    truth = F.interpolate(x.double(), size, mode=detail.mode, **options)
    # Weights are differences of places, which are rounded to float32.
    allowed = 16 * EPS * max(shape[2:]) * float(x.abs().max())
    assert (out - truth).abs().max() <= (0 if "nearest" in detail.mode else allowed)
    check()


def test_threads_share_rows(threads: int) -> None:
    x = torch.randn(3, 16, 7, 5).contiguous(memory_format=torch.channels_last)
    out = torch.full((3, 16, 11, 9), torch.nan).contiguous(memory_format=torch.channels_last)
    known = case.resize(x, out, ResizeDetail("bilinear", False, (None, None))).into(out)
    assert known.threads == threads
    found = resize.plan(known)
    resize.bind(found, x, resize.pack(found, ()), None, out)()
    torch.testing.assert_close(out, F.interpolate(x, (11, 9), mode="bilinear"), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    detail = ResizeDetail("bilinear", False, (None, None))
    x, y = Outline.channels_last_of((1, 17, 5, 7)), Outline.channels_last_of((1, 17, 9, 9))
    assert resize.supports(case.resize(x, y, detail)) == ""
    assert "channels_last" in resize.supports(case.resize(Outline.contiguous_of(x.shape), y, detail))
    assert "float32" in resize.supports(case.resize(x.to(torch.float64), y, detail))
    assert "empty" in resize.supports(case.resize(x, Outline.channels_last_of((0, 17, 9, 9)), detail))
    assert resize.describe(case.resize(x, y, detail))["taps"] == 2


def test_functions_leave_it_to_pytorch() -> None:
    x = torch.randn(1, 17, 5, 7)
    for detail in details():
        y = torch.empty(1, 17, 9, 9)
        choice = backends.choose(case.resize(x, y, detail))
        options: dict[str, Any] = {} if "nearest" in detail.mode else {"align_corners": detail.align_corners}
        assert choice.backend.name == "torch"
        torch.testing.assert_close(choice(x), F.interpolate(x, (9, 9), mode=detail.mode, **options))


class Upsampled(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv, self.options = nn.Conv2d(5, 17, 1), options

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), **self.options)


OPTIONS: list[dict[str, Any]] = [
    {"scale_factor": 2},
    {"scale_factor": (1.7, 2.3), "mode": "bilinear"},
    {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
    {"size": (17, 9), "mode": "bilinear", "align_corners": True},
    {"scale_factor": 0.6, "mode": "nearest-exact"},
    {"size": 20, "mode": "bicubic"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_networks_have_groups_of_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Upsampled(**options).eval(), torch.randn(2, 5, 7, 11)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    found = [(group.kind, group.kernel) for group in fast.explain().groups if group.kind != "copy"]
    assert found == [("pointwise", "halide"), ("resize", "halide")]
