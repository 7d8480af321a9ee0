"""Channel shuffles are one pass over an image, and take the concatenation in front of them with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


def viewed(x: Tensor, parts: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, parts, c // parts, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def permuted(x: Tensor, parts: int) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, parts, c // parts, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


def by_module(x: Tensor, parts: int) -> Tensor:
    return nn.ChannelShuffle(parts)(x)


class Unit(nn.Module):
    """Of ShuffleNet v2: half of the channels pass, twice."""

    def __init__(self, shuffle: Callable[[Tensor, int], Tensor], parts: int, half: int) -> None:
        super().__init__()
        self.stem, self.end = nn.Conv2d(3, 2 * half, 3, padding=1), nn.Conv2d(2 * half, 5, 1)
        self.layers = nn.ModuleList(nn.Conv2d(half, half, 1) for _ in range(2))
        self.shuffle, self.parts = shuffle, parts

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            passed, changed = x.chunk(2, 1)
            x = self.shuffle(torch.cat([passed, layer(changed)], 1), self.parts)
        return self.end(x)


@pytest.mark.parametrize(
    ("shuffle", "parts", "half", "kernel"),
    [
        (viewed, 2, 29, "halide"),
        (permuted, 2, 16, "halide"),
        (by_module, 2, 7, "halide"),
        (viewed, 3, 27, "halide"),
        (viewed, 4, 34, "halide"),
        (viewed, 6, 9, "torch"),
    ],
)
def test_shuffles_are_groups(shuffle: Callable[[Tensor, int], Tensor], parts: int, half: int, kernel: str) -> None:
    model, x = randomise(Unit(shuffle, parts, half)), torch.randn(2, 3, 7, 5)
    compiled = compile(model, x)
    groups = compiled.explain().groups
    assert [(group.kind, group.kernel) for group in groups if group.kind == "shuffle"] == [("shuffle", kernel)] * 2
    if parts == 2:
        assert [group.kind for group in groups] == [
            "normal",
            "pointwise",
            "shuffle",
            "pointwise",
            "shuffle",
            "pointwise",
        ]
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_other_orders_stay_as_they_are() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3, 4, 5, 5).transpose(2, 3).reshape(2, 12, 5, 5)

    x = torch.randn(2, 12, 5, 5)
    compiled = compile(Other().eval(), x)
    assert "shuffle" not in [group.kind for group in compiled.explain().groups]
    torch.testing.assert_close(compiled(x), Other()(x))
