"""Convolutions of one image that are added become one, wherever their taps lie; what is none stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


class Sum(nn.Module):
    """The sum of branches, with the signs given; None is the image itself."""

    def __init__(self, *branches: nn.Module | None, signs: tuple[int, ...] = (1, 1, 1)) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Identity() if branch is None else branch for branch in branches])
        self.signs = signs

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch, sign in zip(self.branches[1:], self.signs[1:], strict=False):
            total = total + branch(x) if sign > 0 else total - branch(x)
        return total


def conv(size: object = 3, padding: object = 1, out: int = 12, **options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, out, size, padding=padding, bias=False, **options), nn.BatchNorm2d(out))  # type: ignore[arg-type]


ONE = {
    "repvgg": lambda: Sum(conv(), conv(1, 0), nn.BatchNorm2d(12)),
    "image_added": lambda: Sum(conv(groups=12), None),
    "image_first": lambda: Sum(None, conv(groups=12), signs=(1, -1)),
    "difference": lambda: Sum(conv(groups=12), conv(1, 0, groups=12), signs=(1, -1)),
    "strided": lambda: Sum(conv(stride=2), conv(1, 0, stride=2)),
    "dilated": lambda: Sum(conv(3, 2, dilation=2), conv(1, 0)),
    "grown_on_both_sides": lambda: Sum(conv((1, 7), (0, 3), groups=12), conv((1, 3), (0, 1), groups=12)),
    "two_taps": lambda: Sum(conv((3, 3), (0, 1)), conv((3, 1), (0, 0))),
    "in_groups": lambda: Sum(conv(groups=3), nn.BatchNorm2d(12)),
    "larger_behind": lambda: Sum(conv(1, 0), conv(5, 2)),
}


def kinds(model: nn.Module, x: Tensor) -> list[str]:
    fast = compile(model, x)
    expected = model.double()(x.double())
    assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return [group.kind for group in fast.explain().groups if group.kind != "copy"]


@pytest.mark.parametrize("name", ONE)
def test_branches_are_one_convolution(name: str) -> None:
    torch.manual_seed(0)
    assert len(kinds(randomise(ONE[name]()), torch.randn(2, 12, 13, 11))) == 1


APART: dict[str, Callable[[], nn.Module]] = {
    "more_taps_than_both": lambda: Sum(conv((1, 5), (0, 2), groups=12), conv((5, 1), (2, 0), groups=12)),
    "taps_between_taps": lambda: Sum(conv(3, 2, dilation=2), conv(3, 1)),
    "activation_between": lambda: Sum(nn.Sequential(conv(), nn.ReLU()), conv()),
    "a_channel_spread": lambda: Sum(conv(out=1), conv(1, 0)),
    "kept_by_another": lambda: Sum(nn.Sequential(conv(), Sum(None, nn.Sigmoid())), conv(1, 0)),
}


@pytest.mark.parametrize("name", APART)
def test_other_sums_stay(name: str) -> None:
    torch.manual_seed(0)
    found = kinds(randomise(APART[name]()), torch.randn(2, 12, 13, 11))
    assert len([kind for kind in found if kind in ("normal", "depthwise", "pointwise", "grouped")]) == 2


def test_signals_have_branches_too() -> None:
    torch.manual_seed(0)
    model = Sum(nn.Conv1d(12, 12, 3, padding=1), nn.Conv1d(12, 12, 1), None)
    assert kinds(model.eval(), torch.randn(2, 12, 13)) == ["normal"]
