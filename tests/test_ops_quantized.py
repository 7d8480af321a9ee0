"""The operator that marks quantisation: its numbers, its gradients, and that PyTorch's tools see one node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepconv.ops.quantized import FAKE_QUANTIZE, fake_quantize


def number(value: float) -> Tensor:
    return torch.tensor(value)


def zero(value: int = 0) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (0.25, 0.0),  # half of a step: to the even one
        (0.75, 1.0),
        (-0.75, -1.0),
        (1.26, 1.5),
        (200.0, 126.0),  # 252 steps above zero point 3
        (-200.0, -1.5),
    ],
)
def test_numbers_by_hand(x: float, want: float) -> None:
    assert float(fake_quantize(number(x), number(0.5), zero(3), -1, 0, 255)) == want


def test_numbers_are_those_of_pytorch() -> None:
    x = torch.randn(5, 3, 7, 2, generator=torch.Generator().manual_seed(0))
    scale, zeros = torch.tensor([0.01, 0.02, 0.005]), torch.tensor([3, 120, 250], dtype=torch.int32)
    want = torch.fake_quantize_per_channel_affine(x, scale, zeros, 1, 0, 255)
    assert torch.equal(fake_quantize(x, scale, zeros, 1, 0, 255), want)
    want = torch.fake_quantize_per_tensor_affine(x, 0.013, 121, 0, 255)
    assert torch.equal(fake_quantize(x, number(0.013), zero(121), -1, 0, 255), want)


def test_what_is_on_the_grid_stays() -> None:
    steps = torch.arange(-127.0, 128)
    for scale in (0.1, 1 / 3, 7e-4, 191.3):
        grid = steps * number(scale)
        assert torch.equal(fake_quantize(grid, number(scale), zero(), -1, -127, 127), grid)


def test_gradients_go_through_inside_of_the_range() -> None:
    x = torch.tensor([-9.0, -0.3, 0.2, 9.0], requires_grad=True)
    fake_quantize(x, number(0.1), zero(10), -1, 0, 20).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]


def test_nan_stays() -> None:
    assert fake_quantize(number(float("nan")), number(0.1), zero(), -1, 0, 255).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pytorch_accepts_the_operator(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 2, dtype=dtype, requires_grad=True)
    scale, zeros = torch.rand(3) + 0.1, torch.zeros(3, dtype=torch.int32)
    assert fake_quantize(x, scale, zeros, 1, -127, 127).dtype == dtype
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(FAKE_QUANTIZE, (x, scale, zeros, 1, -127, 127), test_utils=tests)


def test_a_recorded_graph_has_one_node() -> None:
    class Half(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, number(0.5), zero(), -1, 0, 255)

    graph = torch.export.export(Half(), (torch.rand(3, 2),)).graph
    assert [node.target for node in graph.nodes].count(FAKE_QUANTIZE) == 1
