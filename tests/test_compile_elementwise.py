"""What no convolution takes in is one group of our own, whichever operations and layouts it is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


class Of(nn.Module):
    """A function of the image, and of a vector of constants."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(17, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.vector)


ONE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[str, ...]]] = {
    "scaled": (lambda x, v: F.relu(x * v + 0.5), ("mul", "add", "relu")),
    "twice_the_same": (lambda x, v: x * torch.sigmoid(x * v) * x, ("mul", "sigmoid", "mul", "mul")),
    "alpha": (lambda x, v: torch.sub(x, v, alpha=3), ("mul", "sub")),
    "turned": (lambda x, v: 1 - x, ("sub",)),
    "divided": (lambda x, v: 2.0 / x, ("reciprocal", "mul")),
    "product_added": (lambda x, v: torch.addcmul(x, x, v, value=0.5), ("mul", "mul", "add")),
    "squared": (lambda x, v: torch.sqrt(x**2 + 1), ("mul", "add", "sqrt")),
    "cubed": (lambda x, v: x**3 + (x * v) ** 6, ("mul",) * 6 + ("add",)),
    "power": (lambda x, v: (x.abs() + 0.1) ** 0.3, ("abs", "add", "pow")),
    "power_by_parameter": (lambda x, v: (x.abs() + 0.1).pow(v[0] * 0 + 1.5), ("abs", "add", "pow")),
    "selu": (lambda x, v: F.selu(x * v), ("mul", "elu(1.6732632423543772)", "mul")),
    "logarithms": (lambda x, v: torch.log(x.abs() + 1) + torch.log1p(x.abs()), ("abs", "add", "log", "log1p", "add")),
    "whole_numbers": (
        lambda x, v: torch.round(x * 3) + torch.floor(x) * torch.sign(x),
        ("mul", "round", "floor", "sign", "mul", "add"),
    ),
    "at_least_a_vector": (lambda x, v: x.clamp(min=v), ("maximum",)),
    "clamped": (lambda x, v: torch.clamp(x + v, -0.5, 0.25), ("add", "clamp(-0.5, 0.25)")),
    "clamped_below": (
        lambda x, v: (x + v).clamp(min=0.1).clamp_max(0.5),
        ("add", "clamp(0.1, inf)", "clamp(-inf, 0.5)"),
    ),
    "prelu": (lambda x, v: F.prelu(x, v.flatten()), ("prelu",)),
    "leaky": (lambda x, v: F.leaky_relu(x, 0.2), ("leaky_relu(0.2)",)),
    "greater": (lambda x, v: torch.maximum(x, v * x), ("mul", "maximum")),
    "zeros_of_both_signs": (lambda x, v: (x + 0.0) * -0.0, ("add", "mul")),
}


def groups(model: nn.Module, x: Tensor) -> list[tuple[str, str, tuple[str, ...]]]:
    fast = compile(model, x)
    expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
    zeros = expected == 0
    assert torch.equal(fast(x)[zeros].signbit(), expected[zeros].signbit())
    return [(group.kind, group.kernel, group.fused) for group in fast.explain().groups if group.kind != "copy"]


@pytest.mark.parametrize("name", ONE)
def test_one_group(name: str) -> None:
    torch.manual_seed(0)
    function, operations = ONE[name]
    x = torch.randn(2, 17, 5, 7)
    assert groups(Of(function).eval(), x) == [("elementwise", "halide", operations)]


def test_squeeze_excite_is_four_kernels() -> None:
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce, self.expand = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))

    found = groups(SqueezeExcite().eval(), torch.randn(2, 24, 9, 11))
    assert [kind for kind, _, _ in found] == ["pool", "pointwise", "pointwise", "elementwise"]
    assert found[2][2] == ("hardsigmoid",)
    assert {kernel for _, kernel, _ in found} == {"halide"}


def test_a_convolution_takes_in_what_it_can_first() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.slope = nn.Conv2d(17, 17, 1), nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.slope(self.conv(x) + x) * 0.5

    assert groups(Block().eval(), torch.randn(1, 17, 5, 7)) == [
        ("pointwise", "halide", ("add", "leaky_relu(0.25)")),
        ("elementwise", "halide", ("mul",)),
    ]


def test_what_others_read_is_not_hidden() -> None:
    """A value with two readers is computed once, in a group of its own."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(x) + 1
            return y * 2, y.mean((2, 3))

    x = torch.randn(2, 17, 5, 7)
    fast, (first, second) = compile(Twice().eval(), x), Twice()(x)
    torch.testing.assert_close(fast(x)[0], first)
    torch.testing.assert_close(fast(x)[1], second)
    assert [group.fused for group in fast.explain().groups if group.kind == "elementwise"] == [
        ("tanh", "add"),
        ("mul",),
    ]


class Layouts(nn.Module):
    """A constant that lies otherwise than the image, one tensor that is turned, and a part of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 17, 9, 9))
        self.conv = nn.Conv2d(17, 17, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.place
        turned = y.transpose(2, 3) + y
        return torch.relu(turned[:, 3:11] * 2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_meet(channels_last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 17, 9, 9)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    found = groups(randomise(Layouts()), x)
    assert {kernel for kind, kernel, _ in found} == {"halide"}


def test_other_numbers_are_pytorchs() -> None:
    x = torch.randn(1, 17, 3, 3)
    explained = compile(Of(lambda x, v: x.double() * v + 1).eval(), x).explain()
    assert {group.kernel for group in explained.groups} <= {"torch", "copy"}
    assert any("float64" in group.reason for group in explained.groups)
    whole = Of(lambda x, v: (x > 0) * x)
    torch.testing.assert_close(compile(whole.eval(), x)(x), whole(x))
