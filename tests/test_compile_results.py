"""What a model returns and takes beside tensors: constants stay, anything else is not taken for one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.compile.capture import CaptureError


@dataclass
class Found:
    scores: Tensor


@dataclass(frozen=True)
class Batch:
    images: Tensor


class Pair(NamedTuple):
    scores: Tensor
    name: str


class Entries(dict[str, Any]):
    """A class of somebody's own."""


class Kind(Enum):
    GREY = 1


class Wraps(nn.Module):
    """What a network gives, in something else."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.body(x))


@pytest.mark.parametrize(
    ("wrap", "kind", "unwrap"),
    [
        (Found, "Found", lambda result: result.scores),
        (lambda y: SimpleNamespace(scores=y), "SimpleNamespace", lambda result: result.scores),
        (lambda y: {"all": [Found(y)]}, "Found", lambda result: result["all"][0].scores),
        (lambda y: Entries(scores=y), "Entries", lambda result: result["scores"]),
    ],
    ids=["dataclass", "namespace", "nested", "subclass"],
)
def test_results_in_which_nobody_looks_for_tensors(wrap: Any, kind: str, unwrap: Any) -> None:
    """They would be those of the example, whatever the input: PyTorch runs what makes them, and we the rest."""
    model = Wraps(wrap).eval()
    with pytest.warns(UserWarning, match=f"runs in 1 parts .*: the model cannot be captured: it returns a {kind}"):
        fast = compile(model, torch.randn(1, 3, 9, 9))
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(unwrap(fast(x)), unwrap(model(x)), atol=1e-4, rtol=0)
    assert fast.explain().groups[0].kernel == "halide"
    with pytest.raises(CaptureError, match=f"it returns a {kind}"):
        fast.write(x)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y: Pair(y, "a name"), lambda result: result.scores),
        (lambda y: OrderedDict(scores=y, nothing=None, kind=Kind.GREY, dtype=y.dtype), lambda r: r["scores"]),
        (lambda y: [y, y.shape, len(y), 0.5, b"x"], lambda result: result[0]),
    ],
    ids=["named_tuple", "ordered_dict", "list"],
)
def test_constants_among_the_results_are_given_again(wrap: Any, unwrap: Any) -> None:
    model = Wraps(wrap).eval()
    fast = compile(model, torch.randn(1, 3, 9, 9))
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        wanted, found = model(x), fast(x)
    assert type(wanted) is type(found)
    torch.testing.assert_close(unwrap(found), unwrap(wanted), atol=1e-4, rtol=0)
    assert fast.explain().reason == ""


class Counts(nn.Module):
    """Gives a number of Python's that changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 3), 0

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        self.calls += 1
        return self.conv(x), self.calls


def test_a_number_that_changes_is_no_constant() -> None:
    with pytest.warns(UserWarning, match=r"through PyTorch: beside tensors the model gives now 1 and then 2"):
        fast = compile(Counts().eval(), torch.randn(1, 3, 9, 9))
    assert [fast(torch.randn(1, 3, 9, 9))[1] for _ in range(2)] == [1, 2]


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Any, how: Any = None) -> Tensor:
        y: Tensor = self.conv(x.images if isinstance(x, Batch | SimpleNamespace) else x)
        return y if how is None else 2 * y


@pytest.mark.parametrize("kind", [Batch, lambda x: SimpleNamespace(images=x)], ids=["frozen", "namespace"])
def test_arguments_in_which_nobody_looks_for_tensors(kind: Any) -> None:
    """Who is told apart by identity alone would be taken for the same one with other contents."""
    with pytest.raises(ValueError, match=r"arguments must be tensors or constants, got (Batch|SimpleNamespace)"):
        compile(Takes().eval(), (kind(torch.randn(1, 3, 9, 9)),))


@pytest.mark.parametrize("how", [True, 2, 0.5, "a", Kind.GREY, torch.float32, torch.Size([1]), range(3), 1j])
def test_constants_are_arguments(how: Any) -> None:
    model, x = Takes().eval(), torch.randn(1, 3, 9, 9)
    fast = compile(model, (x, how))
    with torch.no_grad():
        torch.testing.assert_close(fast(x, how), model(x, how), atol=1e-4, rtol=0)
    assert fast.explain().reason == ""
