"""Weights on steps: scales and roundings with less error than the obvious ones, seen on the sums that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sepconv.quantize import rounding
from sepconv.quantize.layers import GraphLayer
from sepconv.quantize.moments import InputMoments, _grouped, _output_size
from sepconv.quantize.ranges import value_range
from sepconv.quantize.rounding import round_weight, weight_scale


def moments_of(x: Tensor) -> InputMoments:
    """Shape: (G, rows, F)"""
    centred = x - x.mean(1, keepdim=True)
    xx = centred.transpose(1, 2) @ centred / x.shape[1]
    return InputMoments(x.mean(1), xx)


def correlated(groups: int, features: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(groups, features, features, generator=draw, dtype=torch.float64)
    return torch.randn(groups, 997, features, generator=draw, dtype=torch.float64) @ mixed


@pytest.mark.parametrize(("groups", "outputs", "features"), [(1, 13, 150), (7, 1, 9), (2, 5, 66)])
def test_moments_round_better_than_the_nearest_step(groups: int, outputs: int, features: int) -> None:
    x = correlated(groups, features)
    weight = torch.randn(groups * outputs, features, generator=torch.Generator().manual_seed(1))
    lost = {}
    for method in ("moments", "nearest"):
        found = round_weight(weight, moments_of(x), "mse", method)
        steps = found.weight / found.scale[:, None]
        assert (steps - steps.round()).abs().max() < 1e-4
        assert steps.abs().max() < 127.5
        change = (found.weight - weight).double().reshape(groups, outputs, features)
        outputs_change = x @ change.transpose(1, 2)
        lost[method] = float((outputs_change - outputs_change.mean(1, keepdim=True)).square().mean())
        assert found.lost == pytest.approx(lost[method], rel=0.02)
    assert lost["moments"] < 0.6 * lost["nearest"]


def test_losses_handed_on_in_blocks_are_those_handed_on_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = moments_of(correlated(2, 131))
    weight = torch.randn(6, 131, generator=torch.Generator().manual_seed(1))
    found = round_weight(weight, moments, "mse", "moments").weight
    monkeypatch.setattr(rounding, "BLOCK", 1)
    assert torch.equal(round_weight(weight, moments, "mse", "moments").weight, found)


def test_scales_reach_the_largest_weight_or_cut_it_where_that_pays() -> None:
    weight = torch.randn(4, 40000, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[2, 0] = 6.5  # far out
    weight[3, 0], importance = 6.5, torch.ones(4, 40000)
    importance[3, 0] = 1e9
    whole, best = weight_scale(weight, None, "minmax"), weight_scale(weight, importance, "mse")
    assert torch.allclose(whole[[0, 2, 3]] * 127, weight[[0, 2, 3]].abs().amax(1))
    assert whole[1] == 1
    assert best[2] < 0.9 * whole[2]
    assert best[3] == whole[3]
    assert best[0] > 0.8 * whole[0]


def test_ranges_cut_rare_values_and_hold_zero() -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).relu()
    values[0] = 12.0
    assert [float(end) for end in value_range([values], "minmax")] == [0, 12]
    low, high = value_range([values[:1000], values[1000:]], "mse")
    assert low == 0
    assert 4 < high < 9
    low, high = value_range([torch.full((5,), 3.0)], "mse")
    assert low == 0
    assert high == pytest.approx(3, rel=0.01)
    low, high = value_range([torch.rand(99) - 5], "mse")
    assert high == 0
    assert low == pytest.approx(-5, rel=0.05)


def test_groups_of_patches() -> None:
    """(N, S, C, k) to (G, N*S, C/G*k), in the order of a grouped weight."""
    p = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert torch.equal(_grouped(p, 2)[1, 4], p[1, 1, 2:].flatten())
    conv = nn.Conv2d(4, 4, (3, 2), (2, 1), (1, 3), (1, 2), groups=2)
    assert tuple(_output_size(conv, (11, 7))) == tuple(conv(torch.zeros(1, 4, 11, 7)).shape[2:])
    same = nn.Conv2d(4, 4, (3, 2), padding="same")
    assert tuple(_output_size(same, (11, 7))) == (11, 7)


def test_a_layer_knows_its_geometry() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, (2, 1), 1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.conv(x)
            return found

    module = torch.export.export(Net().eval(), (torch.zeros(2, 4, 8, 8),)).module()
    [call] = [node for node in module.graph.nodes if node.name == "conv2d"]
    layer = GraphLayer("conv", call.args[1], [call])
    conv = layer.like_conv(module)
    assert (conv.in_channels, conv.out_channels, conv.stride, conv.groups) == (4, 8, (2, 1), 4)
