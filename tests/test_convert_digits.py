"""The converter on a network that has learned something: scikit-learn's handwritten digits."""

from __future__ import annotations

import pytest
import torch
from convertible import convert
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


def block(channels: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network, and held-out images with their labels."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    model = nn.Sequential(
        *block(1, 16), *block(16, 24), nn.MaxPool2d(2), *block(24, 32), *block(32, 32), nn.Flatten(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        chosen = torch.randint(0, 1200, (64,))
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 120)
    return model.eval().double(), x[1200:].double(), y[1200:]


def measure(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def output_error(new: nn.Module, old: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((new(x) - old(x)).square().mean())


def test_each_method_keeps_more_than_the_one_before(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    kept, errors = {}, {}
    for method in ("svd", "least_squares", "sequential"):
        new, _ = convert(model, x[:300], depth_multiplier=1, method=method, reestimate_bn=False)
        kept[method] = measure(new, x[300:], y[300:])
        errors[method] = output_error(new, model, x[300:])
    assert measure(model, x[300:], y[300:]) > 0.9
    assert errors["sequential"] < 0.7 * errors["least_squares"]
    assert errors["least_squares"] < 0.9 * errors["svd"]
    assert kept["sequential"] > kept["least_squares"] + 0.1
    assert kept["least_squares"] > kept["svd"] + 0.1


@pytest.mark.parametrize("metric", ["conv_params", pytest.param("macs", marks=pytest.mark.slow)])
def test_ranks_by_budget_beat_one_rank_for_all(digits: tuple[nn.Module, Tensor, Tensor], metric: str) -> None:
    """On the whole: with few images the pixels that happen to be drawn decide a close race between two layers."""
    model, x, y = digits
    ratios = []
    for rank in (2, 3):
        uniform, plan = convert(model, x[:300], depth_multiplier=rank)
        before, after = plan.conv_params if metric == "conv_params" else plan.macs or (0, 0)
        chosen, _ = convert(model, x[:300], after / before, metric=metric)
        ratios.append(output_error(chosen, model, x[300:]) / output_error(uniform, model, x[300:]))
        assert measure(chosen, x[300:], y[300:]) > measure(model, x[300:], y[300:]) - 0.04
    assert ratios[0] * ratios[1] < 0.8
    assert max(ratios) < 1.1


def test_batch_norm_statistics_lower_the_output_error(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    plain, _ = convert(model, x[:300], depth_multiplier=2, reestimate_bn=False)
    better, _ = convert(model, x[:300], depth_multiplier=2)
    assert output_error(better, model, x[300:]) < output_error(plain, model, x[300:])


@pytest.mark.parametrize("budget", [0.2, *(pytest.param(b, marks=pytest.mark.slow) for b in (0.35, 0.5))])
def test_bottlenecks_lose_less_under_a_budget(digits: tuple[nn.Module, Tensor, Tensor], budget: float) -> None:
    model, x, _ = digits
    errors = {}
    for form in ("separable", "bottleneck"):
        new, _ = convert(model, x[:300], budget, form=form)
        errors[form] = output_error(new, model, x[300:])
    assert errors["bottleneck"] < 0.75 * errors["separable"]
