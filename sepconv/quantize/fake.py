"""The module that stands on an edge of a graph whose numbers are integers, and where such modules stand.

Where they stand depends on the graph and on which layers stay in float32, and on nothing else: a file need not say
more.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from sepconv.ops.quantized import HIGH, LOW, MOST, fake_quantize


class FakeQuantize(nn.Module):
    """Numbers become multiples of a scale; gradients go through.

    Args:
        axis: -1 for one scale, else the dimension along which there are ``count``.
        low, high: the integers at the ends.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, axis: int = -1, count: int = 1, *, low: int = LOW, high: int = HIGH) -> None:
        super().__init__()
        shape = () if axis < 0 else (count,)
        self.axis, self.low, self.high = axis, low, high
        self.register_buffer("scale", torch.ones(shape))
        # Of weights it is 0: a file need not say so for every channel.
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32), persistent=axis < 0)

    @classmethod
    def of_weight(cls, channels: int) -> FakeQuantize:
        """Signed, around zero, a scale for each output channel."""
        return cls(0, channels, low=-MOST, high=MOST)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """The steps that go from `low` to `high`, moved and widened so that zero is one of them."""
        low, high = low.double().clamp_max(0), high.double().clamp_min(0)
        steps = self.high - self.low
        scale = ((high - low) / steps).float()
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        self.scale.copy_(scale)
        self.zero_point.copy_((self.low - low / scale.double()).round().clamp(self.low, self.high))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, self.axis, self.low, self.high)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, {self.low}..{self.high}"


def quantizer_at(module: nn.Module, node: fx.Node) -> FakeQuantize:
    """The module that a node of a graph calls."""
    found = module.get_submodule(str(node.target))
    assert isinstance(found, FakeQuantize)
    return found
