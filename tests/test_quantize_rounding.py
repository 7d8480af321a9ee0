"""Weights on steps: scales and roundings with less error than the obvious ones, seen on the sums that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.quantize import moments, rounding
from sepconv.quantize.layers import GraphLayer
from sepconv.quantize.moments import InputMoments, _grouped, _output_size, input_moments
from sepconv.quantize.ranges import value_range
from sepconv.quantize.rounding import round_weight, weight_scale


def moments_of(x: Tensor) -> InputMoments:
    """Shape: (G, rows, F)"""
    centred = x - x.mean(1, keepdim=True)
    xx = centred.transpose(1, 2) @ centred / x.shape[1]
    return InputMoments(xx)


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
    seen = moments_of(correlated(2, 131))
    weight = torch.randn(6, 131, generator=torch.Generator().manual_seed(1))
    found = round_weight(weight, seen, "mse", "moments").weight
    monkeypatch.setattr(rounding, "BLOCK", 1)
    assert torch.equal(round_weight(weight, seen, "mse", "moments").weight, found)


def test_parts_of_a_patch_are_rounded_on_their_own() -> None:
    """Of 131 values in parts of 44 the last one has 43 and a zero; one scale for all of them."""
    x = F.pad(correlated(2, 131), (0, 1)).unflatten(2, (3, 44)).transpose(1, 2).flatten(0, 1)
    weight = torch.randn(10, 131, generator=torch.Generator().manual_seed(1))
    seen = moments_of(x)
    found = round_weight(weight, InputMoments(seen.xx, 3), "minmax", "moments")
    assert torch.equal(found.scale, weight.abs().amax(1) / 127)
    lost = []
    for part in range(3):
        wanted = F.pad(weight, (0, 1))[:, 44 * part : 44 * (part + 1)]
        own = seen.xx[part::3]
        columns = wanted.double().reshape(2, 5, 44).transpose(1, 2)
        rounded = rounding._one_after_the_other(columns, own, found.scale.reshape(2, 5)).transpose(1, 2).flatten(0, 1)
        have = F.pad(found.weight, (0, 1))[:, 44 * part : 44 * (part + 1)]
        assert torch.equal(rounded.float(), have)
        change = (have - wanted).double().reshape(2, 5, 44)
        lost.append(((change @ own) * change).sum(2).mean())
    assert found.lost == pytest.approx(float(sum(lost)), rel=1e-6)


@torch.no_grad()
def test_moments_of_parts_are_on_the_diagonal_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = torch.export.export(nn.Conv2d(7, 4, 3).eval(), (torch.zeros(2, 7, 8, 8),)).module()
    [call] = [node for node in module.graph.nodes if node.name == "conv2d"]
    layer = GraphLayer("conv", call.args[1], [call])
    given = [torch.randn(5, 7, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(1)]
    whole = input_moments(layer, module, given)
    assert (whole.parts, tuple(whole.xx.shape)) == (1, (1, 63, 63))
    monkeypatch.setattr(moments, "TOGETHER", 25)
    found = input_moments(layer, module, given)
    assert (found.parts, tuple(found.xx.shape)) == (3, (3, 21, 21))
    for part in range(3):
        own = slice(21 * part, 21 * (part + 1))
        assert torch.allclose(found.xx[part], whole.xx[0, own, own], rtol=1e-5, atol=1e-5)


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


def test_every_group_has_scales_for_its_own_inputs() -> None:
    """A weight far out is cut in the group that hardly reads its input, and in that alone."""
    weight = torch.randn(6, 400, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 6.5
    variances = torch.ones(2, 400, dtype=torch.float64)
    variances[0, 0], variances[1, 0] = 1e-6, 1e6
    found = round_weight(weight, InputMoments(torch.diag_embed(variances)), "mse", "nearest").scale * 127
    assert (found[:3] < 5.8).all()
    assert (found[3:] > 6.3).all()


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
