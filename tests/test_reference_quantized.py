"""Quantised convolution as defined: against PyTorch's convolution of whole numbers, and by what the words mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv import reference
from sepconv.kernels import case
from sepconv.kernels.case import Geometry
from sepconv.reference import Quantized

ONE = ((1, 1), ((0, 0), (0, 0)), (1, 1))


def constants(weight: Tensor, numbers: list[float], scale: float = 1.0, bias: Tensor | None = None) -> Quantized:
    return Quantized(weight, bias, torch.full((len(weight),), scale), torch.tensor(numbers))


@pytest.mark.parametrize(
    ("channels", "groups", "outputs", "kernel"), [(6, 1, 5, (3, 2)), (6, 6, 12, (3, 3)), (8, 2, 6, (1, 1))]
)
def test_sums_are_those_of_whole_numbers(channels: int, groups: int, outputs: int, kernel: tuple[int, int]) -> None:
    g = Geometry((2, 1), ((1, 2), (0, 1)), (1, 2))
    x = torch.randint(0, 256, (2, channels, 9, 8), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, channels // groups, *kernel), dtype=torch.int8)
    bias = torch.randint(-9999, 9999, (outputs,), dtype=torch.int32)
    padded = F.pad(x.long() - 77, [amount for pair in reversed(g.padding) for amount in pair])
    sums = F.conv2d(padded, weight.long(), bias.long(), g.stride, 0, g.dilation, groups)
    given = constants(weight, [77, 0, 0, 0.25, 3], 0.0078125, bias)
    y = reference.quantized_conv(x, given, *g, "relu", dtype=torch.float32)
    assert torch.equal(y, (sums.float() * 0.0078125).relu())
    y = reference.quantized_conv(x, given, *g)
    assert y.dtype is torch.uint8
    assert torch.equal(y.long(), (torch.round(sums.double() / 512) + 3).clamp(0, 255).long())


def test_halves_go_to_the_even_number_before_the_zero_point_is_added() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    y = reference.quantized_conv(x, constants(torch.ones(1, 1, 1, 1, dtype=torch.int8), [10, 0, 0, 0.5, 5]), *ONE)
    # 10 stands for 0; 11 for 0.5, which is nearest to 0 and 1; 13 for 1.5, nearest to 1 and 2.
    assert y.flatten()[[0, 9, 10, 11, 12, 13, 15, 255]].tolist() == [0, 5, 5, 5, 6, 7, 7, 127]


def test_what_is_beyond_a_byte_is_at_its_end_and_nan_is_0() -> None:
    x, weight = torch.tensor([[0], [255], [128]], dtype=torch.uint8), torch.full((1, 1), 127, dtype=torch.int8)
    residual = torch.tensor([[0.0], [0.0], [math.nan]])
    y = reference.quantized_conv(x, constants(weight, [128, 0, 0, 9.0, 100]), (), (), (), "", residual)
    assert y.flatten().tolist() == [0, 255, 0]


def test_a_residual_has_numbers_of_its_own() -> None:
    x, weight = torch.tensor([[12]], dtype=torch.uint8), torch.full((1, 1), 3, dtype=torch.int8)
    given = constants(weight, [10, 7, 0.5, 1.0, 1], 2.0)
    y = reference.quantized_conv(x, given, (), (), (), "", torch.tensor([[11]], dtype=torch.uint8))
    assert y.item() == 2 * 3 * 2 + (11 - 7) * 0.5 + 1
    y = reference.quantized_conv(x, given, (), (), (), "", torch.tensor([[11.0]]))
    assert y.item() == 2 * 3 * 2 + 11 + 1


def test_float_images_are_quantized_first() -> None:
    x = torch.tensor([[-1.0], [0.24], [0.26], [9e9], [math.nan]])
    given = constants(torch.ones(1, 1, dtype=torch.int8), [2, 0, 0, 1.0, 0, 2.0])
    y = reference.quantized_conv(x, given, (), (), (), dtype=torch.float32)
    assert y.flatten().tolist() == [-2, 0, 1, 253, -2]


def test_sums_wrap_around() -> None:
    x, weight = torch.tensor([[1]], dtype=torch.uint8), torch.ones(1, 1, dtype=torch.int8)
    bias = torch.tensor([2**31 - 1], dtype=torch.int32)
    y = reference.quantized_conv(x, constants(weight, [0] * 5, bias=bias), (), (), (), dtype=torch.float32)
    assert y.item() == -(2.0**31)


def test_a_case_of_whole_numbers_says_so() -> None:
    x = torch.zeros(1, 4, 5, 5)
    known = case.depthwise(x, torch.zeros(4, 1, 3, 3, dtype=torch.int8), None, Geometry.of_pixels(2))
    assert known.quantized
    assert known.y.dtype is torch.uint8
    assert known.into(torch.zeros(1, 4, 3, 3)).y.dtype is torch.float32
    assert not case.depthwise(x, torch.zeros(4, 1, 3, 3), None, Geometry.of_pixels(2)).quantized
