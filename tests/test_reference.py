"""The definitions themselves: against PyTorch's convolutions, by gradcheck, and by what the words mean."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from torch.nn import functional as F

from sepconv import reference
from sepconv.kernels.case import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ids = [case.name for case in CASES]
_plain = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


def _arguments(g: Geometry) -> tuple[object, ...]:
    return g.stride, g.padding, g.dilation


def _padded(x: torch.Tensor, g: Geometry) -> torch.Tensor:
    return F.pad(x, [amount for pair in reversed(g.padding) for amount in pair])


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_depthwise_conv_equals_grouped_conv(case: Case) -> None:
    g = case.geometry
    x = torch.randn(case.batch, case.channels, *case.image, dtype=torch.float64)
    w = torch.randn(case.channels * case.multiplier, 1, *case.kernel, dtype=torch.float64)
    b = torch.randn(w.shape[0], dtype=torch.float64)
    expected = _CONV[case.dims](_padded(x, g), w, b, g.stride, 0, g.dilation, case.channels)
    y = reference.depthwise_conv(x, w, b, *_arguments(g))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert list(y.shape[2:]) == list(g.output_size(case.image, case.kernel))


@pytest.mark.parametrize("case", [c for c in CASES if c.channels <= 9], ids=lambda c: c.name)
def test_conv_equals_pytorch(case: Case) -> None:
    g = case.geometry
    x = torch.randn(case.batch, case.channels, *case.image, dtype=torch.float64)
    w = torch.randn(3, case.channels, *case.kernel, dtype=torch.float64)
    b = torch.randn(3, dtype=torch.float64)
    expected = _CONV[case.dims](_padded(x, g), w, b, g.stride, 0, g.dilation)
    torch.testing.assert_close(reference.conv(x, w, b, *_arguments(g)), expected, rtol=1e-12, atol=1e-11)


def test_gradients_pass_gradcheck() -> None:
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    dw = torch.randn(4, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    pw = torch.randn(3, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    g = ((2, 1), ((1, 0), (2, 1)), (1, 2))
    assert torch.autograd.gradcheck(lambda x, w: reference.conv(x, w, None, *g), (x, w))
    assert torch.autograd.gradcheck(
        lambda x, dw, pw: reference.separable_conv(x, dw, pw, None, None, *g, "silu", "sigmoid"), (x, dw, pw)
    )


def test_depthwise_channel_changes_only_its_own_outputs() -> None:
    x, w = torch.randn(2, 5, 7, 6), torch.randn(15, 1, 3, 3)
    y = reference.depthwise_conv(x, w, None, *_arguments(_plain))
    changed = x.clone()
    changed[:, 2] += 1
    different = (reference.depthwise_conv(changed, w, None, *_arguments(_plain)) != y).any(dim=(0, 2, 3))
    assert different.tolist() == [c // 3 == 2 for c in range(15)]


def test_normal_conv_mixes_all_channels() -> None:
    x, w = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
    changed = x.clone()
    changed[:, 1] += 1
    before, after = (reference.conv(t, w, None, *_arguments(_plain)) for t in (x, changed))
    assert bool((before != after).any(dim=(0, 2, 3)).all())


def test_pointwise_conv_commutes_with_permutation_of_pixels() -> None:
    x, w = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(3, 5, 1, dtype=torch.float64)
    order = torch.randperm(12)
    y = reference.pointwise_conv(x, w)
    torch.testing.assert_close(reference.pointwise_conv(x[..., order], w), y[..., order], rtol=0, atol=0)


@pytest.mark.parametrize("image", [(7,), (5, 6), (3, 4, 5)], ids=["1d", "2d", "3d"])
def test_pointwise_conv_is_a_linear_layer_on_each_pixel(image: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, *image, dtype=torch.float64)
    w, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = F.linear(x.movedim(1, -1), w, b).movedim(-1, 1)
    torch.testing.assert_close(reference.pointwise_conv(x, w, b), expected)
    torch.testing.assert_close(
        reference.pointwise_conv(x, w.reshape(3, 5, *(1 for _ in image)), b),
        _CONV[len(image)](x, w.reshape(3, 5, *(1 for _ in image)), b),
    )


@pytest.mark.parametrize("multiplier", [1, 3])
def test_normal_conv_of_that_rank_equals_its_separable_form(multiplier: int) -> None:
    """W[o, c] = sum over m of P[o, c*M+m] * D[c*M+m]: the normal convolution is the separable one, exactly."""
    channels, outputs = 4, 6
    dw = torch.randn(channels * multiplier, 1, 3, 3, dtype=torch.float64)
    pw = torch.randn(outputs, channels * multiplier, 1, 1, dtype=torch.float64)
    parts = pw.reshape(outputs, channels, multiplier, 1, 1) * dw.reshape(1, channels, multiplier, 3, 3)
    x = torch.randn(2, channels, 8, 7, dtype=torch.float64)
    normal = reference.conv(x, parts.sum(2), None, *_arguments(_plain))
    separable = reference.separable_conv(x, dw, pw, None, None, *_arguments(_plain))
    torch.testing.assert_close(separable, normal, rtol=1e-12, atol=1e-12)
