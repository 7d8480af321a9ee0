"""Calls made before take a shorter way: the same results, never a stale one, and not where somebody watches."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv
from sepconv import reference
from sepconv.kernels import backends
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit import threads as pool
from sepconv.kernels.torch import aten
from sepconv.ops import call

_WALK = (1, 1), ((1, 1), (1, 1)), (1, 1)


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_calls", {})
    monkeypatch.setattr(backends, "_choices", {})


def _problem(channels_last: bool = True, *, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 8, 11, 13)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return x.requires_grad_(requires_grad), torch.randn(8, 1, 3, 3), torch.randn(8)


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that found an earlier one."""
    found: list[Any] = []
    find = call.find

    def watching(known: Any) -> Any:
        run = find(known)
        found.append(run)
        return run

    monkeypatch.setattr(call, "find", watching)
    return found


def test_a_second_call_is_short_and_right(assert_rounding: Callable[..., None], monkeypatch: Any) -> None:
    found = _watch(monkeypatch)
    for channels_last in (False, True):
        for _ in range(3):
            x, w, b = _problem(channels_last)
            y = sepconv.depthwise_conv2d(x, w, b, 1, 1)
            doubles = [t.double() for t in (x, w, b)]
            truth = reference.depthwise_conv(*doubles, *_WALK)
            assert_rounding(y, truth, reference.depthwise_conv(*[t.abs() for t in doubles], *_WALK), 10)
    assert [known is not None for known in found] == [False, True, True] * 2


@pytest.mark.parametrize(
    ("stride", "padding", "error"),
    [(True, 1, ValueError), (1, 1.0, ValueError), (1, [1, [1]], ValueError), ((1, True), 1, ValueError)],
)
def test_what_equals_a_good_option_is_checked_all_the_same(stride: Any, padding: Any, error: type) -> None:
    x, w, b = _problem()
    for _ in range(2):
        sepconv.depthwise_conv2d(x, w, b, 1, 1)
        sepconv.depthwise_conv2d(x, w, b, (1, 1), [1, 1])
    with pytest.raises(error, match=r"stride|padding"):
        sepconv.depthwise_conv2d(x, w, b, stride, padding)


def test_other_shapes_dtypes_and_options_are_other_calls() -> None:
    x, w, b = _problem()
    for _ in range(2):
        assert sepconv.depthwise_conv2d(x, w, b, 1, 1).shape[2:] == (11, 13)
        assert sepconv.depthwise_conv2d(x, w, b, 2, 1).shape[2:] == (6, 7)
        assert sepconv.depthwise_conv2d(x, w, b, 1, 1, activation="relu").min() >= 0
        assert sepconv.depthwise_conv2d(x, w, None, 1, 1).shape == x.shape
        assert sepconv.depthwise_conv2d(x.double(), w.double(), b.double(), 1, 1).dtype == torch.float64
        with pytest.raises(TypeError, match=r"weight is torch\.float64"):
            sepconv.depthwise_conv2d(x, w.double(), b, 1, 1)
        with pytest.raises(ValueError, match="bias"):
            sepconv.depthwise_conv2d(x, w, b[:7], 1, 1)


def test_gradients_of_a_second_call_are_those_of_the_plain_modules() -> None:
    layer = sepconv.SeparableConv2d(8, 5, 3, padding=1, activation="silu", depth_multiplier=2)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, padding=1, groups=8), torch.nn.SiLU(), torch.nn.Conv2d(16, 5, 1), torch.nn.SiLU()
    )
    plain[0].load_state_dict(layer.depthwise.state_dict())
    plain[2].load_state_dict(layer.pointwise.state_dict())
    for _ in range(3):
        x = torch.randn(2, 8, 11, 13)
        results = []
        for network in (layer, plain):
            network.zero_grad()
            leaf = x.clone().requires_grad_()
            y = network(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *[p.grad for p in network.parameters()]])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_second_call_can_be_differentiated_twice() -> None:
    w = torch.randn(8, 1, 3, 3, requires_grad=True)
    for _ in range(2):
        x = torch.randn(1, 8, 5, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(sepconv.depthwise_conv2d(x, w, None, 1, 1).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), w)
        conv = torch.nn.functional.conv2d(x, w, None, 1, 1, 1, 8)
        (grad,) = torch.autograd.grad(conv.square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(grad.square().sum(), w)
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-3)


def test_modes_profilers_and_autocast_see_the_operator() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, w, b = _problem()
    for _ in range(2):
        sepconv.depthwise_conv2d(x, w, b, 1, 1)
    seen: list[str] = []
    with Names():
        sepconv.depthwise_conv2d(x, w, b, 1, 1)
    assert "sepconv.depthwise_conv.default" in seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sepconv.depthwise_conv2d(x, w, b, 1, 1)
    assert "sepconv::depthwise_conv" in [event.key for event in profile.key_averages()]
    with torch.autocast("cpu", torch.bfloat16):
        assert sepconv.depthwise_conv2d(x, w, b, 1, 1).dtype == torch.bfloat16
    assert sepconv.explain(sepconv.depthwise_conv2d, x, w, b, 1, 1)[0].op == "depthwise_conv"


def test_transformations_of_torch_func() -> None:
    xs, w, b = _problem()
    pw = torch.randn(5, 8, 1, 1)

    def ours(w: Tensor, x: Tensor) -> Tensor:
        return sepconv.pointwise_conv2d(sepconv.separable_conv2d(x, w, pw), pw[:, :5]).square().sum()

    def theirs(w: Tensor, x: Tensor) -> Tensor:
        hidden = reference.pointwise_conv(reference.depthwise_conv(x[None], w, None, (1, 1), ((0, 0),) * 2, (1, 1)), pw)
        return reference.pointwise_conv(hidden, pw[:, :5]).square().sum()

    sepconv.depthwise_conv2d(xs, w, b)
    grads = [torch.func.vmap(torch.func.grad(loss), (None, 0))(w, xs) for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-2)
    choices = sepconv.explain(torch.func.vmap(lambda x: sepconv.depthwise_conv2d(x, w, b)), xs)
    assert [choice.kernel for choice in choices] == ["torch"]
    assert "torch.func" in choices[0].reasons["halide"]


def test_no_call_keeps_a_tensor_alive() -> None:
    leaf, w, b = _problem(requires_grad=True)
    for _ in range(2):
        y = sepconv.depthwise_conv2d(leaf, w, b, 1, 1, activation="gelu")
        z = sepconv.separable_conv2d(leaf, w, torch.randn(3, 8, 1, 1))
        (y.sum() + z.sum()).backward()
        with torch.no_grad():
            sepconv.depthwise_conv2d(leaf, w, b, 1, 1)
            sepconv.pointwise_conv2d(leaf, torch.randn(3, 8, 1, 1))
    gone = [weakref.ref(t) for t in (leaf, w, b, y, z)]
    del leaf, w, b, y, z
    gc.collect()
    assert [reference() for reference in gone] == [None] * 5


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "MAX_CALLS", 5)
    monkeypatch.setattr(backends, "MAX_CHOICES", 5)
    w = torch.randn(8, 1, 3, 3)
    for width in range(3, 30):
        assert sepconv.depthwise_conv2d(torch.randn(1, 8, 3, width), w).shape[3] == width - 2
        assert len(call._calls) <= 5
        assert len(backends._choices) <= 5


def test_the_number_of_threads_is_followed() -> None:
    before = torch.get_num_threads()
    x, w = torch.randn(8, 32, 61, 61), torch.randn(32, 1, 7, 7)
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results += [sepconv.depthwise_conv2d(x, w, None, 1, 3) for _ in range(2)]
            if not runtime.missing():
                assert pool._threads.value == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what a process holds")
def test_ten_thousand_sizes_take_no_more_memory_than_five_thousand() -> None:
    weight, mix = torch.randn(16, 1, 3, 3), torch.randn(16, 16, 1, 1)
    resident = []
    for number in range(10_000):
        x = torch.randn(1, 16, 33 + number % 100, 33 + number // 100).contiguous(memory_format=torch.channels_last)
        sepconv.separable_conv2d(x, weight, mix, padding=1)
        sepconv.depthwise_conv2d(x, weight, padding=1)
        if number % 500 == 499:
            gc.collect()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert runtime.cached_kernels() <= runtime.MAX_KERNELS
    # What is remembered grows to its bound and is forgotten, in turn.
    assert max(resident[10:]) - max(resident[:10]) < 16 << 20


def test_more_threads_are_another_call() -> None:
    x, before, keys = torch.randn(1, 8, 9, 9), torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            keys.add(call.key((x,), "depthwise"))
    finally:
        torch.set_num_threads(before)
    assert len(keys) == 2


def test_pytorchs_result_comes_in_the_layout_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps the layout in all cases we know, but does not promise it."""
    conv = aten.CONV[2]
    monkeypatch.setitem(aten.CONV, 2, lambda *arguments: conv(*arguments).contiguous())
    everywhere = [one for one in backends.BACKENDS["depthwise"] if one.numbers is None and not one.device]
    halide, pytorch = everywhere
    late = replace(halide, slower=lambda case: "it is Tuesday")
    monkeypatch.setitem(backends.BACKENDS, "depthwise", [late, pytorch])
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        y = sepconv.depthwise_conv2d(x, torch.randn(8, 1, 3, 3), padding=1)
        assert y.is_contiguous(memory_format=torch.channels_last)
