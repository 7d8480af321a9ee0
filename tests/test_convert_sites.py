from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sepconv.convert.sites import find_sites, norm_scale, record, trace_norms
from sepconv.leaves import Inputs


class Norms(nn.Module):
    """Every relation a batch norm can have to a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Conv2d(3, 3, 3, padding=1)
        self.direct_bn = nn.BatchNorm2d(3)
        self.active = nn.Conv2d(3, 3, 3, padding=1)
        self.active_bn = nn.BatchNorm2d(3)
        self.inplace = nn.Conv2d(3, 3, 3, padding=1)
        self.inplace_bn = nn.BatchNorm2d(3)
        self.bare = nn.Conv2d(3, 3, 3, padding=1)
        self.sequence = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Identity(), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.direct_bn(self.direct(x))
        x = self.active_bn(torch.sigmoid(self.active(x)))
        x = self.inplace_bn(torch.relu_(self.inplace(x)))
        return self.sequence(self.bare(x))


FOLLOWERS = {"direct": "direct_bn", "active": "", "inplace": "", "bare": "", "sequence.0": "sequence.2"}


def test_record_finds_norms_that_directly_follow() -> None:
    model = Norms().eval()
    sites = record(model, find_sites(model), Inputs.of(torch.randn(2, 3, 7, 7)))
    assert {site.name: site.norm for site in sites} == FOLLOWERS


def test_trace_finds_norms_without_input() -> None:
    model = Norms().eval()
    sites = find_sites(model)
    assert trace_norms(model, sites) == ""
    assert {site.name: site.norm for site in sites} == {**FOLLOWERS, "sequence.0": ""}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(3, 3, 3)
        self.early = nn.Conv2d(3, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        return self.late(x) if x.sum() == x.sum() else x


def test_trace_says_why_it_is_not_possible() -> None:
    model = Branching()
    assert "TraceError: symbolically traced variables cannot be used as inputs to control flow" in trace_norms(
        model, find_sites(model)
    )


def test_record_orders_by_execution_and_keeps_shapes() -> None:
    model = Branching()
    sites = record(model, find_sites(model), Inputs.of(torch.randn(2, 3, 11, 9)))
    assert [site.name for site in sites] == ["early", "late"]
    assert sites[0].inputs == [(3, 11, 9)]
    assert sites[1].outputs == [(3, 3, 2)]
    assert (sites[0].pixels, sites[0].input_pixels) == (20, 99)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_record_removes_its_hooks_when_the_model_fails() -> None:
    model = Branching()
    with pytest.raises(ValueError, match=r"layer 'early' \(Conv2d\) fails on inputs of shape \(2, 5, 11, 9\) \(Runt"):
        record(model, find_sites(model), Inputs.of(torch.randn(2, 5, 11, 9)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_convolution_without_batch_dimension_stays() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(image) for image in x])

    model = Unbatched()
    (site,) = record(model, find_sites(model), Inputs.of(torch.randn(2, 3, 5, 5)))
    assert site.reason == "called without a batch dimension"


@pytest.mark.parametrize("make", [nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False)], ids=["affine", "plain"])
def test_norm_scale_is_what_the_norm_multiplies_with(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), make(5)).double()
    model(torch.randn(20, 3, 7, 7, dtype=torch.float64))
    model.eval()
    if model[1].weight is not None:
        nn.init.normal_(model[1].weight)
    (site,) = record(model, find_sites(model), Inputs.of(torch.randn(2, 3, 7, 7, dtype=torch.float64)))
    y = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    slope = (model[1](y + 1) - model[1](y)).mean((0, 2, 3)).detach()
    torch.testing.assert_close(norm_scale(model, site), slope.abs())


def test_norm_without_statistics_weighs_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False))
    (site,) = record(model, find_sites(model), Inputs.of(torch.randn(4, 3, 7, 7)))
    assert norm_scale(model, site) is None
    (site,) = find_sites(model)
    assert norm_scale(model, site) is None


def test_skip_takes_names_prefixes_and_functions() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3)), nn.Conv2d(3, 3, 3))
    model.add_module("1x", nn.Conv2d(3, 3, 3))

    def skipped(skip: object) -> list[str]:
        return [site.name for site in find_sites(model, skip) if site.reason]  # type: ignore[arg-type]

    assert skipped(["0"]) == ["0.0"]
    assert skipped(["1"]) == ["1"]
    assert skipped(lambda name, module: isinstance(module, nn.Conv2d) and name != "1") == ["0.0", "1x"]
