"""The list of backends: its order, the reasons it gives, and that one entry is all that another backend needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sepconv
from sepconv.kernels import backends, case
from sepconv.kernels.backends import BACKENDS, Backend, choose
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.ops import call

_WALK = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))

halide = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_calls", {})
    monkeypatch.setattr(backends, "_choices", {})


def _tensors(channels_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(1, 8, 9, 9)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=form), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)


def _separable(x: Tensor, dw: Tensor, pw: Tensor, residual: Tensor | None = None) -> Case:
    first = case.depthwise(x, dw, None, _WALK._replace(padding=((1, 1), (dw.shape[3] // 2,) * 2)))
    return case.separable(first, case.pointwise(first.y, pw, None, residual))


def test_pytorch_is_the_last_of_every_list_and_takes_everything() -> None:
    strange = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    for op, entries in BACKENDS.items():
        assert entries[-1].name == "torch", op
        assert [entry.name for entry in entries].count("torch") == 1
        known = replace(case.pool(strange, strange.mean((2, 3))), op=op)
        assert entries[-1].supports(known) == entries[-1].slower(known) == ""


@halide
def test_reasons_are_of_other_backends_than_the_one_that_computes() -> None:
    """Two kernels of one backend: that one of them does not take a case is no reason against the backend."""
    x = torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    found = choose(case.normal(x, torch.randn(4, 8, 3, 3), None, None, _WALK))
    assert (found.backend.name, found.reasons) == ("halide", {})
    refused = choose(case.normal(x.contiguous(), torch.randn(4, 8, 3, 3), None, None, _WALK))
    assert refused.backend.name == "torch"
    assert refused.reasons["halide"].startswith("the kernel reads channels_last images only")


@halide
def test_the_first_that_can_and_wins_computes() -> None:
    x, w, pw = _tensors()
    assert choose(case.depthwise(x, w, None, _WALK)).backend.name == "halide"
    small = choose(case.pointwise(x, pw))
    assert small.backend.name == "torch"
    assert "multiply-adds take less time" in small.reasons["halide"]
    double = choose(case.depthwise(x.double(), w.double(), None, _WALK))
    assert (double.backend.name, list(double.reasons)) == ("torch", ["halide"])
    elsewhere = choose(case.depthwise(x.to("meta"), w.to("meta"), None, _WALK))
    assert elsewhere.reasons["halide"] == "the kernel runs on cpu tensors but got device meta"


@halide
def test_a_separable_convolution_is_one_kernel_or_two_in_turn() -> None:
    x, dw, pw = _tensors(channels_last=True)
    assert choose(_separable(x, dw, pw)).parts == ()
    two = choose(_separable(x.contiguous(), dw, pw))
    assert two.backend.name == "depthwise, then pointwise"
    assert "contiguous layout" in two.reasons["halide"]
    assert [part.backend.name for part in two.parts] == ["halide", "torch"]
    residual = torch.randn(1, 4, 9, 9)
    y = choose(_separable(x.contiguous(), dw, pw, residual))(x.contiguous(), dw, pw, None, None, residual)
    truth = F.conv2d(F.conv2d(x, dw, None, 1, 1, 1, 8), pw) + residual
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


def test_every_backend_computes_what_pytorch_does() -> None:
    x, dw, pw = _tensors(channels_last=True)
    image, weight = torch.randn(1, 3, 9, 9), torch.randn(5, 3, 3, 3)
    rows, matrix = torch.randn(6, 8), torch.randn(4, 8)
    calls: list[tuple[Case, tuple[Tensor | None, ...], Tensor]] = [
        (case.depthwise(x, dw, None, _WALK), (x, dw, None), F.conv2d(x, dw, None, 1, 1, 1, 8)),
        (case.pointwise(x, pw, activation="relu"), (x, pw, None, None), F.conv2d(x, pw).relu()),
        (case.pointwise(rows, matrix), (rows, matrix, None, None), rows @ matrix.T),
        (
            case.normal(image, weight, None, None, _WALK),
            (image, weight, None, None),
            F.conv2d(image, weight, None, 1, 1),
        ),
        (_separable(x, dw, pw), (x, dw, pw, None, None, None), F.conv2d(F.conv2d(x, dw, None, 1, 1, 1, 8), pw)),
        (case.pool(x, x.mean((2, 3))), (x,), x.mean((2, 3))),
    ]
    for known, tensors, truth in calls:
        for backend in BACKENDS[known.op]:
            if not backend.supports(known):
                y = backend.prepare(known)(*tensors)
                torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4, msg=f"{backend.name}, {known.op}")


@halide
def test_given_memory_is_filled_by_what_can_be_bound() -> None:
    x, _, pw = _tensors(channels_last=True)
    out = torch.empty(1, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    bound = choose(case.pointwise(x, pw).into(out))
    assert bound.backend.binder is not None  # what a call costs does not count here
    with pytest.raises(TypeError, match="given memory"):
        bound(x, pw, None, None)
    plan = bound.backend.binder.plan(bound.case)
    bound.backend.binder.bind(plan, x, bound.backend.binder.pack(plan, (pw, None)), None, out)()
    torch.testing.assert_close(out, F.conv2d(x, pw), rtol=1e-4, atol=1e-4)
    wide = torch.randn(8, 1, 3, 9)
    assert choose(_separable(x, wide, pw).into(out)).backend.name == "depthwise, then pointwise"
    empty = case.pointwise(x[:0], pw).into(out[:0])
    assert choose(empty).reasons == {"halide": "the result is empty"}


def _third(slower: Callable[[Case], str] = lambda case: "") -> Backend:
    """A backend as somebody would add one: for any device and numbers, here images of 8 channels alone."""
    return Backend(
        "third",
        prepare=lambda case: lambda x, weight, bias: torch.full(case.result.shape, 3.0),
        supports=lambda case: "" if case.which == "forward" and case.x.shape[1] == 8 else "it takes 8 channels",
        slower=slower,
        describe=lambda case: {"threads": case.threads},
    )


@pytest.mark.parametrize("needs_grad", [False, True])
def test_one_entry_is_all_that_another_backend_needs(monkeypatch: pytest.MonkeyPatch, needs_grad: bool) -> None:
    x, w, _ = _tensors()
    monkeypatch.setitem(BACKENDS, "depthwise", [_third(), *BACKENDS["depthwise"]])
    w.requires_grad_(needs_grad)
    for _ in range(2):
        assert sepconv.depthwise_conv2d(x, w).eq(3.0).all()
    [told] = sepconv.explain(sepconv.depthwise_conv2d, x, w)
    assert (told.kernel, told.schedule, told.reasons) == ("third", {"threads": torch.get_num_threads()}, {})
    [told] = sepconv.explain(sepconv.depthwise_conv2d, x[:, :4], w[:4])
    assert told.reasons["third"] == "it takes 8 channels"
    assert not sepconv.depthwise_conv2d(x[:, :4], w[:4]).eq(3.0).any()


def test_reasons_come_in_the_order_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, _ = _tensors()
    late = replace(BACKENDS["depthwise"][1], slower=lambda case: "it is late")
    monkeypatch.setitem(BACKENDS, "depthwise", [_third(lambda case: "it is Tuesday"), late, BACKENDS["depthwise"][-1]])
    [told] = sepconv.explain(sepconv.depthwise_conv2d, x, w)
    assert told.kernel == "torch"
    assert list(told.reasons) == ["third", "halide"]
    assert told.reasons["third"] == "it is Tuesday"


@pytest.mark.parametrize("when", ["prepared", "called"])
def test_what_cannot_be_built_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def fail(*given: Any) -> Any:
        raise runtime.BuildError("the compiler gave up")

    x, w, _ = _tensors()
    broken = replace(_third(), prepare=fail if when == "prepared" else lambda case: fail)
    monkeypatch.setitem(BACKENDS, "depthwise", [broken, BACKENDS["depthwise"][-1]])
    for _ in range(2):
        torch.testing.assert_close(sepconv.depthwise_conv2d(x, w), F.conv2d(x, w, groups=8))
    [told] = sepconv.explain(sepconv.depthwise_conv2d, x, w)
    assert (told.kernel, told.reasons) == ("torch", {"third": "the compiler gave up"})


def test_choices_are_remembered_up_to_a_bound_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, _ = _tensors()
    known = case.depthwise(x, w, None, _WALK)
    assert choose(known) is choose(case.depthwise(torch.zeros_like(x), w, None, _WALK))
    before = choose(known)
    backends.forget()
    assert choose(known) is not before
    monkeypatch.setattr(backends, "MAX_CHOICES", 3)
    for threads in range(1, 9):
        choose(replace(known, threads=threads))
        assert len(backends._choices) <= 3


def test_forgetting_calls_forgets_choices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a call that was made before would keep the schedule that a new table has replaced."""
    x, w, _ = _tensors()
    sepconv.depthwise_conv2d(x, w)
    monkeypatch.setitem(BACKENDS, "depthwise", [_third(), *BACKENDS["depthwise"]])
    assert not sepconv.depthwise_conv2d(x, w).eq(3.0).all()
    call.forget()
    assert sepconv.depthwise_conv2d(x, w).eq(3.0).all()


def test_another_device_is_remembered_like_any_other() -> None:
    x, w, _ = (tensor.to("meta") for tensor in _tensors())
    assert choose(case.depthwise(x, w, None, _WALK)) is choose(case.depthwise(x, w, None, _WALK))
