"""Batch norms as a factor and a summand: exact in float64, also where float32 would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sepconv import norms


def _lively(affine: bool) -> Any:
    norm = nn.BatchNorm2d(5, affine=affine).eval()
    for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if values is not None:
            nn.init.uniform_(values, 0.5, 2.0)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_is_the_two_modules_in_float64(affine: bool, bias: bool) -> None:
    conv, norm, x = nn.Conv2d(3, 5, 3, bias=bias), _lively(affine), torch.randn(2, 3, 7, 7).double()
    scale, shift = norms.scale_and_shift_of(norm)
    weight, summand = norms.fold(conv.weight, conv.bias, scale, shift)
    assert {t.dtype for t in (scale, shift, weight, summand)} == {torch.float64}
    expected = norm.double()(conv.double()(x))
    torch.testing.assert_close(torch.conv2d(x, weight, summand), expected, rtol=1e-12, atol=1e-12)
    assert not scale.requires_grad


def test_a_dead_channel_keeps_its_digits() -> None:
    mean, variance = torch.tensor([12345.678]), torch.tensor([1e-12])
    scale, shift = norms.scale_and_shift(mean, variance, None, None, 1e-5)
    exact = (variance.double() + 1e-5) ** -0.5
    torch.testing.assert_close(scale, exact, rtol=1e-15, atol=0)
    torch.testing.assert_close(mean.double() * scale + shift, torch.zeros(1).double(), rtol=0, atol=1e-9)
