"""What a key of the store stands for is one value, whatever was there before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.compile.store import Store


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 3.0], [2.0, 4.0]]).t()),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1, 2])),
        (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])[1:]),
    ],
    ids=["sign of zero", "strides", "shape", "dtype", "offset"],
)
def test_literals_that_differ_are_two_constants(first: Tensor, second: Tensor) -> None:
    """Also in strides and offset: a step of the plan reads the memory as it lay when the graph was captured."""
    store = Store({})
    kept = [store.frozen(first), store.frozen(second)]
    assert kept[0] is not kept[1]
    assert torch.equal(1 / kept[1].tensor, 1 / second)


@pytest.mark.parametrize(
    "literal", [torch.tensor([1.5, 2.5]), torch.tensor(True), torch.tensor([1j, 2]), torch.ones(0)]
)
def test_equal_literals_are_one_constant(literal: Tensor) -> None:
    store = Store({})
    first = store.frozen(literal)
    assert store.frozen(literal.clone()) is first


def test_a_tensor_that_took_the_place_of_a_named_one_has_no_name() -> None:
    """The number of an object belongs to another one when the first is gone."""
    store = Store({"weight": torch.zeros(100)})
    others = [torch.full((100,), float(i)) for i in range(1, 50)]
    assert [store.frozen(other).key[0] for other in others] == ["unnamed"] * 49


class Standardised(nn.Conv2d):
    """The convolution of NFNets and BiT: filters of mean 0 and deviation 1, by an operation with several results."""

    def __init__(self, by: str) -> None:
        super().__init__(9, 5, 3)
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "norm":
            rows = F.batch_norm(self.weight.reshape(1, 5, -1), None, None, training=True, momentum=0.0)
            return F.conv2d(x, rows.reshape_as(self.weight), self.bias)
        variance, mean = torch.var_mean(self.weight, [1, 2, 3], keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-6).sqrt(), self.bias)


@pytest.mark.parametrize("by", ["norm", "var_mean"])
def test_results_of_operations_with_several_are_constants(by: str) -> None:
    model, x = Standardised(by).eval(), torch.randn(1, 9, 6, 7)
    compiled = compile(model, x)
    assert [group.kind for group in compiled.explain().groups if group.kind != "copy"] == ["normal"]
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


class LeastAndLargest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.tensor([3.0, 1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        least, largest = torch.aminmax(self.numbers)
        return (x - least) / (largest - least)


def test_results_of_one_operation_are_told_apart() -> None:
    model, x = LeastAndLargest().eval(), torch.randn(4, 5)
    torch.testing.assert_close(compile(model, x)(x), model(x))


class Positions(nn.Module):
    """A convolution of a constant, added to the image behind reshapes: what comes out is no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(1, 3, 5, 7))
        self.project, self.norm = nn.Conv2d(3, 16, 1), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        places = self.project(self.grid).reshape(1, -1, 35).permute(0, 2, 1)
        return self.norm(x.reshape(len(x), 16, -1).permute(0, 2, 1) + places)


def test_a_convolution_of_constants_is_one_itself_and_takes_nothing_in() -> None:
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(1, 16, 5, 7)
    fast = compile(model, x)
    assert fast.explain().reason == ""
    assert "pointwise" not in {group.kind for group in fast.explain().groups}
    for given in (x, torch.randn(1, 16, 5, 7)):
        torch.testing.assert_close(fast(given), model(given), rtol=1e-5, atol=1e-5)
