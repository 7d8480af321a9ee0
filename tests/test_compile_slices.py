"""Large batches: the first layers image by image, the others with all images at once."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

# The package's attribute of that name is the function.
slices: Any = importlib.import_module("sepconv.compile.slices")


class Deep(nn.Module):
    """Large activations first, small ones last, with a residual on both sides of where the batch comes together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise, self.pointwise = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.shrink, self.project = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Conv2d(16, 8, 1)
        self.inner, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.pointwise(torch.relu(self.depthwise(y)))
        z = self.project(self.shrink(y))
        return z + self.last(torch.relu(self.inner(z)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("most_bytes", [0, 100_000, 10**9])
def test_images_in_turn_give_what_the_batch_gives(
    most_bytes: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_MANY_CACHES", most_bytes / machine.host().l2_bytes)
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.randn(5, 3, 19, 23).contiguous(memory_format=memory_format)
    fast = compile(model, x)
    network = next(iter(fast._networks.values()))
    assert not isinstance(network, str)
    images, sliced = network.arena.slices
    with torch.no_grad():
        truth = model(x)
        for _ in range(2):
            torch.testing.assert_close(fast(x), truth, rtol=1e-5, atol=1e-5)
    assert all(group.kernel == "halide" for group in fast.explain(measure=True).groups)
    batches = [kernel.case.x.shape[0] for lowered in network.lowered for kernel in lowered.kernels]
    assert batches == [1 if i < sliced else 5 for i in range(len(network.program.steps))]
    if most_bytes == 10**9:
        assert sliced == 0
    else:
        assert 1 < sliced <= len(network.program.steps)
        assert images == 5
        assert any(region.images == 5 for region in network.arena.regions)
    if most_bytes == 100_000:
        assert sliced < len(network.program.steps)
