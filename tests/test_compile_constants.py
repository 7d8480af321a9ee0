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
    """Its weights are normalised in every call, by an operation with several results."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, padding=1)


def test_one_of_several_results_is_a_constant_too() -> None:
    torch.manual_seed(0)
    model, x = Standardised(5, 7, 3).eval(), torch.randn(1, 5, 9, 11)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert [group.kind for group in fast.explain().groups if group.kind != "copy"] == ["normal"]


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
