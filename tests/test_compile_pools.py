"""Pools over windows of pixels are groups with a kernel of ours, whatever they are called with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "stem_of_resnet": (lambda x: F.max_pool2d(x, 3, 2, 1), "max_pool"),
    "ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), "max_pool"),
    "dilated": (lambda x: F.max_pool2d(x, (2, 3), 3, 1, (5, 1)), "max_pool"),
    "spp": (lambda x: F.max_pool2d(x, 13, 1, 6), "max_pool"),
    "mean": (lambda x: F.avg_pool2d(x, 2), "avg_pool"),
    "mean_ceil": (lambda x: F.avg_pool2d(x, 4, 3, 2, True), "avg_pool"),
    "mean_ceil_of_the_image": (lambda x: F.avg_pool2d(x, 4, 3, 2, True, False), "avg_pool"),
    "mean_by": (lambda x: F.avg_pool2d(x, 3, 1, 1, divisor_override=5), "avg_pool"),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (7, 2)), "avg_pool"),
    "adaptive_uneven": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), "avg_pool"),
    "adaptive_to_more": (lambda x: F.adaptive_avg_pool2d(x, (17, 5)), "avg_pool"),
    "adaptive_maximum": (lambda x: F.adaptive_max_pool2d(x, (2, 8)), "max_pool"),
    "adaptive_maximum_uneven": (lambda x: F.adaptive_max_pool2d(x, (3, 5)), "max_pool"),
    "with_places": (
        lambda x: torch.cat([y.float() for y in F.max_pool2d(x, 3, return_indices=True)], 1),
        "aten.max_pool2d_with_indices.default",
    ),
    "signal": (lambda x: F.max_pool1d(x.flatten(2), 3), "aten.max_pool2d_with_indices.default"),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_are_groups(name: str) -> None:
    function, kind = POOLS[name]
    x = torch.randn(2, 19, 14, 16).contiguous(memory_format=torch.channels_last)
    compiled = compile(Calls(function).eval(), x)
    [found] = [group for group in compiled.explain().groups if "pool" in group.kind]
    assert (found.kind, found.kernel) == (kind, "torch" if kind.startswith("aten") else "halide")
    torch.testing.assert_close(compiled(x), function(x))


def test_a_pool_of_other_numbers_says_so() -> None:
    x = torch.randn(2, 19, 14, 16, dtype=torch.float64)
    [group] = compile(Calls(POOLS["mean"][0]).eval(), x).explain().groups
    assert group.kernel == "torch"
    assert "the kernels compute in float32 and the image is torch.float64" in group.reason
