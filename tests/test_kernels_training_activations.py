"""Activations and their gradients as kernels compute them, number by number, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels import stages
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.prologue import Prologue

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")

CURVES = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 5.25, -5.25, 6.0, -6.0, 1e-30)


def _image(numbers: Tensor) -> Tensor:
    """Four channels of them each."""
    return numbers.repeat_interleave(4).view(1, -1, 1, 4).permute(0, 3, 1, 2)


def _everywhere() -> Tensor:
    return torch.cat([torch.linspace(-12, 12, 50_001), torch.linspace(-1e-3, 1e-3, 101), torch.logspace(1, 30, 101)])


def _error(found: Tensor, exact: Tensor, x: Tensor) -> float:
    """Relative to the argument, below 1 as it is."""
    assert bool(torch.isfinite(found).all())
    return float(((found.double() - exact).abs() / x.double().abs().clamp_min(1.0)).max())


@pytest.mark.parametrize("activation", CURVES)
def test_a_curve_is_as_exact_as_float32(activation: str) -> None:
    """Three roundings of the argument at most; beyond a limit a curve is its limit."""
    x = _image(_everywhere())
    found = stages.finish(x, Prologue.alone(activation, 4))
    assert _error(found, ACTIVATIONS[activation].function(x.double()), x) < 2e-7


@pytest.mark.parametrize("activation", CURVES)
def test_a_slope_is_as_exact_as_float32(activation: str) -> None:
    x = _image(_everywhere())
    found = stages.finish_gradients(torch.ones_like(x), x, Prologue.alone(activation, 4)).x
    argument = x.double().requires_grad_()
    ACTIVATIONS[activation].function(argument).sum().backward()
    assert argument.grad is not None
    assert _error(found, argument.grad, x) < 6e-7


@pytest.mark.parametrize("activation", CURVES)
def test_nan_and_infinity_are_pytorchs(activation: str) -> None:
    x = _image(torch.tensor(SPECIAL))
    found = stages.finish(x, Prologue.alone(activation, 4))
    torch.testing.assert_close(found, ACTIVATIONS[activation].function(x), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_slopes_of_nan_and_infinity(activation: str) -> None:
    x = _image(torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]))
    found = stages.finish_gradients(torch.ones_like(x), x, Prologue.alone(activation, 4)).x
    expected = _image(torch.tensor([torch.nan, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-7, equal_nan=True)
