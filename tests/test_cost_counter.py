"""Counts against the literature, against formulas, and against sums of ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.cost import Layer, count, separable_ratio
from sepconv.models import MobileNetV1Normal


class Call(nn.Module):
    """A module made of a function of its input and its one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


OPERATIONS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("normal", nn.Conv1d(3, 5, 4, bias=False), (3, 11)),
    ("normal", nn.Conv2d(3, 5, (1, 7), (2, 3), bias=False), (3, 5, 23)),
    ("normal", nn.Conv2d(4, 3, 3, dilation=2, bias=False), (4, 7, 11)),
    ("normal", nn.Conv3d(2, 3, 2, bias=False), (2, 3, 4, 5)),
    ("normal", nn.Conv2d(1, 3, 3, bias=False), (1, 5, 5)),
    ("pointwise", nn.Conv2d(7, 5, 1, 2, bias=False), (7, 5, 5)),
    ("pointwise", sepconv.PointwiseConv2d(7, 5, stride=2, bias=False), (7, 5, 5)),
    ("pointwise", sepconv.PointwiseConv1d(7, 5, bias=False), (7, 3)),
    ("grouped", nn.Conv2d(6, 4, 3, groups=2, bias=False), (6, 5, 5)),
    ("depthwise", nn.Conv2d(6, 12, 3, groups=6, bias=False), (6, 5, 5)),
    ("depthwise", sepconv.DepthwiseConv2d(6, 3, bias=False, depth_multiplier=2), (6, 5, 5)),
    ("depthwise", sepconv.DepthwiseConv2d(1, 3, bias=False, depth_multiplier=2), (1, 5, 5)),
    ("depthwise", sepconv.DepthwiseConv3d(3, (1, 2, 3), 2, bias=False), (3, 4, 5, 6)),
    ("transposed", nn.ConvTranspose2d(3, 5, 3, 2, bias=False), (3, 4, 5)),
    ("transposed", nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (4, 5)),
    ("linear", nn.Linear(7, 5, bias=False), (7,)),
    ("linear", nn.Linear(7, 5, bias=False), (3, 7)),
    ("linear", Call(lambda x, w: torch.einsum("nchw,oc->nohw", x, w), 5, 7), (7, 3, 2)),
    ("linear", Call(lambda x, w: (x @ w).unsqueeze(0), 7), (7,)),
    ("normal", Call(lambda x, w: F.conv2d(x, w), 5, 3, 3, 3), (3, 7, 7)),
    ("normal", Call(lambda x, w: F.conv2d(x, w.view(5, 3, 3, 3).transpose(2, 3)), 5, 27), (3, 7, 7)),
    ("depthwise", Call(lambda x, w: sepconv.depthwise_conv2d(x, w), 3, 1, 3, 3), (3, 7, 7)),
    ("matmul", Call(lambda x, w: x.flatten(2).transpose(1, 2) @ x.flatten(2) * w, 1), (3, 5, 2)),
]


@pytest.mark.parametrize(("kind", "module", "shape"), OPERATIONS)
def test_macs_are_the_sum_of_ones(kind: str, module: nn.Module, shape: tuple[int, ...]) -> None:
    """With ones everywhere and no padding, the outputs add up to the number of products in them."""
    for p in module.parameters():
        nn.init.ones_(p)
    products = module(torch.ones(1, *shape)).sum().item()
    cost = count(module, shape)
    (row,) = [layer for layer in cost.layers if layer.macs]
    assert (row.kind, row.macs, cost.macs) == (kind, products, products)
    assert cost.params == sum(layer.params for layer in cost.layers) == sum(p.numel() for p in module.parameters())
    assert cost.conv_params == (0 if kind in ("linear", "matmul") else cost.params)


def test_padding_taps_count() -> None:
    assert count(nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 1, 1)).macs == 9


def test_rows_describe_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 5), (2, 1), padding=(1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(160, 7))
    first, last = count(model.to(torch.bfloat16), (3, 8, 5)).layers
    assert first == Layer(
        name="0",
        kind="normal",
        input_shape=(3, 8, 5),
        output_shape=(8, 4, 5),
        kernel_size=(3, 5),
        stride=(2, 1),
        params=3 * 8 * 15 + 8,
        macs=3 * 8 * 15 * 20,
        bytes=2 * (3 * 8 * 15 + 8 + 3 * 40 + 8 * 20),
        separable_params=3 * (15 + 8) + 8,
        separable_macs=3 * (15 + 8) * 20,
        ratio=pytest.approx(separable_ratio(8, (3, 5))),
    )
    assert (last.name, last.input_shape, last.output_shape, last.macs) == ("3", (160,), (7,), 1120)
    assert (last.params, last.bytes, last.ratio) == (1127, 2 * (1127 + 160 + 7), None)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_fused_layer_counts_as_its_parts(dims: int) -> None:
    separable: Any = {1: sepconv.SeparableConv1d, 2: sepconv.SeparableConv2d, 3: sepconv.SeparableConv3d}[dims]
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    fused = separable(3, 7, 3, 2, 1, depth_multiplier=2, activation="relu")
    parts = nn.Sequential(conv(3, 6, 3, 2, 1, groups=3), nn.ReLU(), conv(6, 7, 1), nn.ReLU())
    with sepconv.ops.explain.record() as choices:
        fused(torch.zeros(1, 3, *(5,) * dims))
    assert choices[0].op == "separable_conv"
    shape = (3, *(5,) * dims)
    rows, expected = count(fused, shape).layers, count(parts, shape).layers
    assert [layer.name for layer in rows] == ["depthwise", "pointwise"]
    assert [dataclasses.replace(layer, name="") for layer in rows] == [
        dataclasses.replace(layer, name="") for layer in expected
    ]
    assert rows[1].ratio == pytest.approx(separable_ratio(7, (3,) * dims, 2), rel=1e-12)


def test_a_pair_is_found_behind_norm_activation_and_squeeze_excite() -> None:
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    middle = (nn.BatchNorm2d(8), nn.SiLU(), SqueezeExcite())
    model = nn.Sequential(nn.Conv2d(8, 8, 5, groups=8), *middle, nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1))
    ratios = {layer.name: layer.ratio for layer in count(model, (8, 9, 9)).layers if layer.ratio is not None}
    assert ratios == {"4": pytest.approx(separable_ratio(16, 5))}


def test_what_runs_twice_counts_twice_but_has_its_parameters_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    cost = count(model, (4, 5, 5))
    assert (cost.params, cost.conv_params, cost.macs) == (4 * 36 + 4, 4 * 36, 2 * 4 * 36 * 25)
    assert [(layer.name, layer.params) for layer in cost.layers] == [("0", 148), ("0", 0)]


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    cost = count(nn.Sequential(first, second), (5,))
    assert (cost.params, cost.macs) == (25, 50)
    assert [(layer.name, layer.params) for layer in cost.layers] == [("0", 25), ("1", 0)]


def test_parameters_that_take_no_part_are_shown() -> None:
    model = Call(lambda x, w: x, 3)
    model.spare = nn.Conv2d(3, 5, 3, bias=False)
    cost = count(model, (3, 4, 4))
    assert (cost.params, cost.conv_params, cost.macs) == (3 + 135, 135, 0)
    assert [(layer.name, layer.kind, layer.params) for layer in cost.layers] == [
        ("", "unused", 3),
        ("spare", "unused", 135),
    ]


def test_parameters_of_other_operations() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4), nn.LayerNorm([4, 3, 3]))
    rows = [(layer.name, layer.kind, layer.params, layer.macs) for layer in count(model, (4, 3, 3)).layers]
    assert rows == [("0", "norm", 8, 0), ("1", "other", 4, 0), ("2", "norm", 72, 0)]


def test_weight_norm() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3, bias=False))
    cost = count(conv, (3, 5, 5))
    assert (cost.params, cost.conv_params, cost.macs) == (135 + 5, 135, 135 * 9)


def test_attention_and_recurrence() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    assert count(SelfAttention(), (7, 16)).macs == 7 * 4 * 16 * 16 + 2 * 7 * 7 * 16
    recurrent = count(nn.LSTM(5, 3, batch_first=True), (7, 5))
    assert recurrent.macs == 7 * 4 * 3 * (5 + 3)
    assert recurrent.params == sum(layer.params for layer in recurrent.layers)


def test_cost_as_text_and_as_json() -> None:
    cost = count(sepconv.SeparableConv2d(32, 64, 3, padding=1, bias=False, norm="batch"), (32, 8, 8))
    text = str(cost).splitlines()
    assert text[2].split() == ["pointwise", "pointwise", "32x8x8", "64x8x8", "2,048", "131,072", "0.127"]
    assert text[-1] == "2,528 parameters (2,336 convolution weights), 149,504 MACs, 50,304 bytes"
    assert json.loads(json.dumps(dataclasses.asdict(cost)))["layers"][0]["kernel_size"] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "ratio"),
    [((512, 3), 1 / 512 + 1 / 9), ((64, (1, 7)), 1 / 64 + 1 / 7), ((64, (3, 3, 3), 4), 4 * (1 / 64 + 1 / 27))],
)
def test_separable_ratio(arguments: tuple[Any, ...], ratio: float) -> None:
    assert separable_ratio(*arguments) == pytest.approx(ratio, rel=1e-15)


@pytest.mark.parametrize("arguments", [(0, 3), (8, 0), (8, (3, 0)), (8, (-3, -3)), (8, 3, 0)])
def test_separable_ratio_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(
        ValueError, match="separable_ratio: out_channels, kernel_size and depth_multiplier must be positive"
    ):
        separable_ratio(*arguments)


def test_ratio_of_whole_networks_is_between_the_filters_and_one() -> None:
    cost = count(MobileNetV1Normal(0.25), (3, 64, 64))
    ratios = [layer.ratio for layer in cost.layers if layer.kind == "normal"]
    assert len(ratios) == 14
    assert all(ratio is not None and 1 / 9 < ratio < 1 for ratio in ratios)
    assert math.isclose(ratios[-1] or 0, separable_ratio(256, 3))
