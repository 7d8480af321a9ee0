"""What a key of the store stands for is one value, whatever was there before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
