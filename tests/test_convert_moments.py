from __future__ import annotations

from typing import Any

import pytest
import torch
from convertible import gather, make_conv, smooth_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sepconv.convert import moments as second_moments
from sepconv.convert.moments import Moments, patches


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.just("same"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_patches_times_weight_is_the_convolution(
    kernel: Any, stride: Any, dilation: Any, padding: Any, mode: str
) -> None:
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, padding_mode=mode, bias=False).double()
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    y = conv(x).detach()
    chosen = torch.randperm(y[0, 0].numel())[:13]
    p = patches(conv, x, y.shape[2:], chosen).flatten(2)
    torch.testing.assert_close((p @ conv.weight.detach().flatten(1).T).mT, y.flatten(2)[:, :, chosen])


@pytest.mark.parametrize(("dims", "size"), [(1, (17,)), (3, (5, 7, 6))])
def test_patches_of_signals_and_volumes(dims: int, size: tuple[int, ...]) -> None:
    conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dims](3, 4, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = conv(x).detach()
    p = patches(conv, x, y.shape[2:], torch.arange(y[0, 0].numel())).flatten(2)
    torch.testing.assert_close((p @ conv.weight.detach().flatten(1).T).mT, y.flatten(2))


def test_moments_are_those_of_all_patches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = make_conv(), smooth_images(5)
    target = conv(x) + torch.randn(12, 7, 11, 11, dtype=torch.float64)
    monkeypatch.setattr(second_moments, "CHUNK", 121 * 45 * 5)
    moments = Moments(conv)
    for part in (slice(0, 7), slice(7, 12)):
        moments.add(x[part], conv(x[part]), target[part], 10**6, torch.Generator())
    problem = moments.problem(torch.eye(7, dtype=torch.float64), 0.0)
    p = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 45)
    y = target.flatten(2).transpose(1, 2).reshape(-1, 7)
    covariance = torch.cov(torch.cat([p, y], 1).T, correction=0)
    torch.testing.assert_close(problem.xx, covariance[:45, :45])
    torch.testing.assert_close(problem.yx, covariance[45:, :45])
    torch.testing.assert_close(problem.yy, covariance[45:, 45:])
    weight = torch.randn(7, 5, 9, dtype=torch.float64)
    lack = y - y.mean(0) - (p - p.mean(0)) @ weight.flatten(1).T
    torch.testing.assert_close(problem.error(weight), float(lack.square().sum() / len(p)))
    bias = conv.bias + moments.bias(weight)
    torch.testing.assert_close((p @ weight.flatten(1).T + bias).mean(0), y.mean(0))


def test_moments_of_patches_that_hardly_vary() -> None:
    """In float32 squares of values near 1 are rounded by more than these values vary."""
    conv = make_conv().float()
    x = 1 + 1e-4 * smooth_images(5).float()
    moments = gather(conv, x, conv(x) + 1e-4 * torch.randn(12, 7, 11, 11))
    exact = gather(conv.double(), x.double())
    inner = [i for i in range(45) if i % 9 == 4]  # the middle of the filter, which sees no padding
    xx, truth = (m.problem(torch.eye(7, dtype=torch.float64), 0.0).xx[inner][:, inner] for m in (moments, exact))
    torch.testing.assert_close(xx, truth, rtol=1e-2, atol=1e-2 * float(truth.diagonal().mean()))


@pytest.mark.parametrize("value", [0.1, 0.3, 1.7, 123.4, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_constant_patches_are_those_of_the_ridge(value: float, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(5, 7, 3).to(dtype)
    moments = Moments(conv)
    for count in (3, 8, 13):
        x = torch.full((count, 5, 9, 9), value, dtype=dtype)
        moments.add(x, conv(x), None, 17, torch.Generator())
    xx = moments.problem(torch.eye(7, dtype=torch.float64), 1e-3).xx
    assert torch.linalg.cond(xx) < 1.01


def test_moments_take_the_pixels_asked_for() -> None:
    conv, x = make_conv(), smooth_images(5)
    assert gather(conv, x, pixels=17).count == 12 * 17
    assert gather(conv, x, pixels=1000).count == 12 * 121


def test_products_in_float32_are_exact_enough_for_a_fit() -> None:
    """Second moments of many patches of a float32 network, half of them mirrored, against float64."""
    conv = nn.Conv2d(64, 5, 3, padding=1).requires_grad_(False)  # 576 values, more than one strip
    x = smooth_images(64, count=24).float()
    xx = gather(conv, x).problem(torch.eye(5, dtype=torch.float64), 0.0).xx
    truth = torch.cov(F.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1), correction=0)
    assert float((xx - truth).norm() / truth.norm()) < 1e-6


def test_moments_held_in_the_layers_precision_are_those_of_float64_to_its_rounding() -> None:
    conv = nn.Conv2d(5, 7, 3, padding=1)
    x = smooth_images(5).float() + 100  # what all values have in common is counted from their first mean
    found = {}
    for brief in (True, False):
        moments = Moments(conv, brief=brief)
        assert moments.xx.dtype == (torch.float32 if brief else torch.float64)
        for part in x.split(3):
            moments.add(part, conv(part).detach(), None, 10**6, torch.Generator())
        moments.add_up()
        assert moments.xx.dtype == torch.float64
        found[brief] = moments.problem(torch.eye(7, dtype=torch.float64), 0.0).xx
    # Each of the four sums rounds once; the diagonal is the largest.
    largest = float(found[False].diagonal().max())
    assert 0 < float((found[True] - found[False]).abs().max()) <= 4 * 2.0**-24 * largest
