"""A plan is compared with its model: strictly, but for networks that multiply rounding themselves."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.compile.verify import MOST, Nudged, tolerance
from sepconv.kernels.halide.jit import runtime
from sepconv.ops.quantized import fake_quantize


class Amplifies(nn.Module):
    """Each step doubles the distance of two numbers: rounding becomes visible, by our kernels as by PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).sigmoid()
        for _ in range(11):
            y = 4 * y * (1 - y) * 0.99999
        return y


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
def test_a_small_defect_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of half a percent in one layer, of the kind that looks like rounding."""
    instance = importlib.import_module("sepconv.compile.instance")
    run = instance.Instance.run
    monkeypatch.setattr(instance.Instance, "run", lambda self, x: [y * 1.005 for y in run(self, x)])
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 9, 9)
    with pytest.warns(UserWarning, match=r"the captured operations give other results than the model \(by 0\.005\)"):
        compile(model, x)


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
def test_a_network_that_multiplies_rounding_is_compiled() -> None:
    torch.manual_seed(0)
    model, x = Amplifies().eval(), torch.randn(1, 3, 9, 11)
    fast = compile(model, x)
    assert fast.explain().reason == ""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        errors = [float((y.double() - exact).abs().max()) for y in (fast(x), model(x))]
    assert errors[1] > 1e-5
    assert errors[0] < 30 * errors[1]


def test_tolerance_grows_with_what_rounding_moves() -> None:
    one = torch.ones(3)
    assert tolerance(1e-4, [one], [one]) == 1e-4
    assert tolerance(1e-4, [one + 1e-4], [one]) == pytest.approx(3e-3, rel=1e-2)
    assert tolerance(1e-4, [one + 0.5], [one]) == MOST


def test_what_lies_between_two_steps_falls_to_either() -> None:
    """A mean of bytes often does; what is nearer to one step stays there, and weights are left alone."""
    scale, zero = torch.tensor(0.25), torch.tensor(3, dtype=torch.int32)
    x = torch.tensor([0.125, 0.13, 1.0]).repeat(64, 1)
    with Nudged():
        moved = fake_quantize(x, scale, zero, -1, 0, 255)
        kept = fake_quantize(x, scale.repeat(64), zero.repeat(64) * 0, 0, -127, 127)
    assert set(moved[:, 0].tolist()) == {0.0, 0.25}
    assert (moved[:, 1:] == torch.tensor([0.25, 1.0])).all()
    assert torch.equal(kept, fake_quantize(x, scale.repeat(64), zero.repeat(64) * 0, 0, -127, 127))
