from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sepconv.leaves import Inputs
from sepconv.leaves.inputs import joined, labels_of

A, B, Y = torch.randn(3, 2), torch.randn(3, 5), torch.tensor([1, 0, 2])


@dataclass
class Encoding:
    left: Tensor
    right: Tensor | None = None
    labels: Tensor | None = None


Pair = namedtuple("Pair", ["images", "labels"])
BATCHES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Tensor | None]] = {
    "tensor": (A, (A,), {}, None),
    "only": ([A], (A,), {}, None),
    "pair": ([A, Y], (A,), {}, Y),
    "mask": ((A, B), (A,), {}, None),
    "named tuple": (Pair(A, Y), (A,), {}, Y),
    "several": (((A, B), Y), (A, B), {}, Y),
    "several alone": (((A, B),), (A, B), {}, None),
    "dict": ({"left": A, "right": B, "labels": Y}, (), {"left": A, "right": B}, Y),
    "mapping": (OrderedDict(left=A, target=B), (), {"left": A}, None),
    "dict and target": (({"left": A}, Y), (), {"left": A}, Y),
    "dataclass": (Encoding(A, labels=Y), (), {"left": A}, Y),
    "list for one argument": ((([A, B],),), ([A, B],), {}, None),
}


@pytest.mark.parametrize(("batch", "args", "kwargs", "labels"), BATCHES.values(), ids=BATCHES)
def test_what_a_batch_is_called_with(
    batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor | None
) -> None:
    found = Inputs.of(batch)
    torch.testing.assert_close(found.args, args)
    torch.testing.assert_close(found.kwargs, kwargs)
    assert Inputs.of(found) is found
    assert (labels_of(batch) is None) == (labels is None)
    if labels is not None:
        torch.testing.assert_close(labels_of(batch), labels)


@pytest.mark.parametrize("batch", ["x.png", 3, None, (), {}, Encoding])
def test_what_is_no_batch(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a tensor or batches of tensors .*, got "):
        Inputs.of(batch)


def test_samples_are_taken_of_every_tensor_and_joined_again() -> None:
    whole = Inputs.of({"left": A, "right": {"in": B, "scale": 7}})
    assert whole.divisible
    assert len(whole) == 3
    assert whole.values_per_sample == 7
    parts = [whole[:1], whole[1:]]
    assert [len(part) for part in parts] == [1, 2]
    assert parts[0].structure == parts[1].structure
    assert parts[0].kind != parts[1].kind
    again = joined(parts)
    torch.testing.assert_close((again.args, again.kwargs), (whole.args, whole.kwargs))
    assert whole[torch.tensor([2])].kwargs["left"].tolist() == A[2:].tolist()
    assert whole.structure != Inputs.of({"left": A, "right": {"in": B, "scale": 8}}).structure


def test_samples_that_cannot_be_told_apart_stay_together() -> None:
    for args in ((A, torch.tensor(0.5)), (A, B[:2])):
        mixed = Inputs(args)
        assert not mixed.divisible
        assert mixed[:1] is mixed
    images = Inputs(([A, A],))
    assert not images.divisible
    assert len(images) == 2
    assert len(Inputs((torch.tensor(0.5),))) == 1
    assert len(Inputs((3,))) == 0


def test_moving_changes_fractions_alone_and_running_changes_nothing() -> None:
    given = Inputs((A.clone(), Y, torch.randn(2, 3, 4, 5)), {"scale": 2})
    moved = given.to(torch.device("cpu"), torch.float64, torch.channels_last)
    assert [t.dtype for t in moved.tensors] == [torch.float64, torch.int64, torch.float64]
    assert moved.tensors[2].is_contiguous(memory_format=torch.channels_last)
    assert given.run(lambda a, *_, scale: a.mul_(scale))[0, 0] == 2 * A[0, 0]
    assert torch.equal(given.args[0], A)
    assert str(given) == "(3, 2), (3,), (2, 3, 4, 5), scale 2"
