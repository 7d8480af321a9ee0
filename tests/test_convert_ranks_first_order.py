from __future__ import annotations

from typing import Any

import pytest
import torch
from convertible import Shared
from torch import Tensor, nn

from sepconv.convert.ranks.first_order import Changes, draws, output_errors, weight_gradient
from sepconv.leaves import Inputs


def changes(conv: Any, count: int = 2) -> Changes:
    generator = torch.Generator().manual_seed(5)
    size, outputs = conv.weight.numel(), conv.out_channels
    weights = 1e-4 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    return Changes(conv, weights, 1e-4 * torch.randn(count, outputs, generator=generator, dtype=torch.float64))


def really(model: nn.Module, tried: Changes, place: int, x: Tensor) -> float:
    """The squared change of an image's outputs, by two runs."""
    conv = tried.conv
    bias = conv.bias
    assert bias is not None
    before = model(x)
    conv.weight.data += tried.weights[place].view_as(conv.weight)
    bias.data += tried.shifts[place]
    moved = float((model(x) - before).square().sum() / len(x))
    conv.weight.data -= tried.weights[place].view_as(conv.weight)
    bias.data -= tried.shifts[place]
    return moved


@pytest.mark.parametrize("kind", ["chain", "shared"])
def test_small_changes_move_the_outputs_by_what_is_foretold(kind: str) -> None:
    torch.manual_seed(2)
    chain = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, padding_mode="reflect"), nn.Tanh(), nn.Conv2d(6, 4, (1, 3)))
    model = (chain if kind == "chain" else Shared()).double().requires_grad_(False)
    x = torch.randn(24, 3, 11, 11, dtype=torch.float64)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    tried = [changes(conv) for conv in convs]
    output_errors(model, tried, [Inputs.of(x[:13]), Inputs.of(x[13:])], draws=200)
    for each in tried:
        wanted = [really(model, each, place, x) for place in range(2)]
        assert each.errors.tolist() == pytest.approx(wanted, rel=0.15)


def test_what_the_network_does_in_place_changes_nothing() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            x.mul_(0)
            return y + x

    model = InPlace().double().requires_grad_(False)
    tried = changes(model.conv)
    x = torch.randn(16, 3, 7, 7, dtype=torch.float64)
    output_errors(model, [tried], [Inputs.of(x)], draws=50)
    moved = nn.functional.conv2d(x, tried.weights[0].view(3, 3, 3, 3), tried.shifts[0], padding=1)
    assert float(tried.errors[0]) == pytest.approx(float(moved.square().sum() / 16), rel=0.15)


def test_weight_gradients_are_autograds() -> None:
    for conv in (nn.Conv2d(3, 5, 3, (2, 1), "valid", 2), nn.Conv1d(3, 4, 5, padding="same"), nn.Conv3d(2, 3, 2)):
        shape = (2, conv.in_channels, *[9, 8, 7][: len(conv.kernel_size)])
        x, gradient = torch.randn(shape), None
        y = conv(x)
        gradient = torch.randn_like(y)
        (wanted,) = torch.autograd.grad(y, conv.weight, gradient)
        torch.testing.assert_close(weight_gradient(conv, x, gradient), wanted, rtol=1e-4, atol=1e-4)


def test_fewer_images_get_more_signs() -> None:
    assert [draws(count) for count in (1, 40, 64, 128, 256)] == [4, 4, 2, 1, 1]
