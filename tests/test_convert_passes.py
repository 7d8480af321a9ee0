from __future__ import annotations

import torch
from torch import Tensor, nn

from sepconv.convert.passes import calls
from sepconv.leaves import Inputs


def test_calls_stop_after_the_last_and_see_values_before_they_change() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.later = 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.conv(x)
                x.zero_()
                x = self.conv(x)
            except Exception:
                return x
            self.later += 1
            return x

    model, x = Twice(), torch.randn(2, 2, 3, 3)
    seen = calls(model, model.conv, Inputs.of(x), 2)
    assert model.later == 0
    assert not model.conv._forward_hooks
    torch.testing.assert_close(seen[0][1], nn.functional.conv2d(x, model.conv.weight, model.conv.bias).detach())
    assert torch.equal(seen[1][0], torch.zeros_like(x))
