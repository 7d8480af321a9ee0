"""The public functions on a device that has Triton's kernels. Without a GPU the CPU takes its place: the programs are
interpreted, and what a proof measures is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton_checks import DEVICE, kernel, needs_triton

import sepconv
from sepconv.kernels import backends
from sepconv.kernels.backends import BACKENDS
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.triton import depthwise, proof, verdicts
from sepconv.kernels.triton.events import Times
from sepconv.kernels.triton.proof import Workbench
from sepconv.ops import autograd, call

pytestmark = needs_triton

_TIMES = {"torch": Times(0.5, 0.5), "0": Times(0.125, 0.25)}


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The kernels for a GPU take this device's tensors, one tile each; which passes were proven."""
    done: list[str] = []
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(call, "_calls", {})
    monkeypatch.setattr(autograd, "_in_one_walk", lambda *given: None)  # of the CPU's tensors alone
    monkeypatch.setattr(backends, "_choices", {})
    [entry] = [backend for backend in BACKENDS["depthwise"] if backend.name == "triton"]
    there = replace(entry, device=DEVICE.type, supports=depthwise.unsuitable)
    monkeypatch.setitem(BACKENDS, "depthwise", [there, BACKENDS["depthwise"][-1]])
    monkeypatch.setitem(BACKENDS, "separable", BACKENDS["separable"][-2:])

    def time(calls: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        return {name: _TIMES[name] for name in calls}

    monkeypatch.setattr(proof, "on_device", lambda device: Workbench(proof._run, proof.compare, time))
    monkeypatch.setattr(depthwise, "_kernels", lambda case, tried: [lambda: done.append(case.which) or kernel(case)])
    monkeypatch.setattr(depthwise, "_chosen", lambda case: kernel(case))
    verdicts.forget()
    depthwise._proofs.clear()
    yield done
    verdicts.forget()


def _tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(1, 8, 5, 6).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(8, 1, 3, 3).to(DEVICE, dtype), torch.randn(8).to(DEVICE, dtype)


def _run(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The result and the gradients."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = sepconv.depthwise_conv2d(*leaves, padding=1, activation="relu")
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _by_pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, 1, 1, 1, 8).relu()
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_forward_and_gradients_are_proven_once_and_told(proofs: list[str]) -> None:
    given = _tensors()
    found: list[list[Tensor]] = []
    told = sepconv.explain(lambda: found.append(_run(*given)))
    assert [one.kernel for one in told] == ["triton"] * 3
    assert proofs == ["forward", "grad_input", "grad_weight"]
    assert told[0].schedule["milliseconds"] == 0.125
    assert told[0].schedule["pytorch_milliseconds"] == 0.5
    again = _run(*given)
    assert len(proofs) == 3
    assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    for ours, theirs in zip(again, _by_pytorch(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_verdict_of_another_process_needs_no_proof(proofs: list[str]) -> None:
    x, weight, bias = _tensors()
    for _ in range(2):
        with torch.no_grad():
            sepconv.depthwise_conv2d(x, weight, bias)
        verdicts.forget()
        call.forget()
    assert proofs == ["forward"]


def test_where_pytorch_is_faster_it_runs_and_both_times_are_told(
    proofs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_TIMES, "0", Times(0.625, 0.25))
    [told] = sepconv.explain(sepconv.depthwise_conv2d, *_tensors())
    assert told.kernel == "torch"
    assert told.reasons["triton"] == "it takes 0.6250 ms on this device, PyTorch's kernel 0.5000 ms"


def test_a_wrong_kernel_is_never_used(proofs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "_kernels", lambda case, tried: [lambda: lambda *given: kernel(case)(*given) + 1])
    given = _tensors()
    [told] = sepconv.explain(sepconv.depthwise_conv2d, *given)
    assert (told.kernel, told.reasons["triton"][:19]) == ("torch", "its result is wrong")
    torch.testing.assert_close(sepconv.depthwise_conv2d(*given), F.conv2d(*given, groups=8))


def test_what_fails_when_it_is_called_gives_way(proofs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Tensor:
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(depthwise, "_chosen", lambda case: fail)
    given = _tensors()
    [told] = sepconv.explain(sepconv.depthwise_conv2d, *given)
    assert told.kernel == "torch"
    assert told.reasons["triton"] == "it failed on this device: RuntimeError: misaligned address"


def test_images_at_addresses_that_were_not_proven_are_pytorchs(proofs: list[str]) -> None:
    """The code for them reads fewer bytes at once. Where numbers are read one by one, nothing depends on it."""
    memory, (_, weight, bias) = torch.randn(1000).to(DEVICE), _tensors()
    odd = memory[1:241].view(1, 5, 6, 8).permute(0, 3, 1, 2)
    [told] = sepconv.explain(sepconv.depthwise_conv2d, odd, weight, bias)
    assert (told.kernel, told.reasons["triton"]) == (
        "torch", "a tensor's memory begins at no multiple of 16 bytes",
    )  # fmt: skip
    contiguous = memory[1:241].view(1, 8, 5, 6)
    [told] = sepconv.explain(sepconv.depthwise_conv2d, contiguous, weight, bias)
    assert told.kernel == "triton"


@pytest.mark.parametrize("needs_grad", [False, True])
def test_while_a_graph_is_captured_pytorchs_kernel_runs(
    proofs: list[str], monkeypatch: pytest.MonkeyPatch, needs_grad: bool
) -> None:
    """Nothing of that is remembered: the next call is proven. What was proven before is used in the graph."""
    [entry, last] = BACKENDS["depthwise"]
    capturing = replace(entry, postponed=lambda case: "a CUDA graph is captured")
    monkeypatch.setitem(BACKENDS, "depthwise", [capturing, last])
    x, weight, bias = _tensors()
    weight.requires_grad_(needs_grad)
    pointwise = torch.randn(4, 8, 1, 1).to(DEVICE)
    with torch.set_grad_enabled(needs_grad):
        for _ in range(2):
            sepconv.depthwise_conv2d(x, weight, bias)
        [told] = sepconv.explain(sepconv.depthwise_conv2d, x, weight, bias)
        assert (told.kernel, told.reasons["triton"]) == ("torch", "a CUDA graph is captured")
        sepconv.separable_conv2d(x, weight, pointwise)
        assert proofs == []
        monkeypatch.setitem(BACKENDS, "depthwise", [entry, last])
        sepconv.separable_conv2d(x, weight, pointwise)
        assert proofs == ["forward"]
        sepconv.depthwise_conv2d(x, weight, bias)
        assert proofs == ["forward"] * 2
        monkeypatch.setitem(BACKENDS, "depthwise", [capturing, last])
        [told] = sepconv.explain(sepconv.depthwise_conv2d, x, weight, bias)
        assert told.kernel == "triton"


def test_under_autocast_numbers_have_16_bits(proofs: list[str]) -> None:
    x, weight, bias = _tensors()
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        told = sepconv.explain(lambda: sepconv.depthwise_conv2d(x, weight, bias))
        assert told[0].kernel == "triton"
        assert sepconv.depthwise_conv2d(x, weight, bias).dtype is torch.bfloat16


@pytest.mark.slow
def test_deterministic_algorithms_have_the_same_kernels(proofs: list[str]) -> None:
    given = _tensors()
    torch.use_deterministic_algorithms(True)
    try:
        told = sepconv.explain(lambda: _run(*given))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [one.kernel for one in told] == ["triton"] * 3


@pytest.mark.slow
def test_a_compiled_graph_calls_the_same_kernels(proofs: list[str]) -> None:
    """The operators are opaque to torch.compile: no proof while it traces, one when the graph runs."""
    layer = sepconv.DepthwiseConv2d(8, 3, padding=1, device=DEVICE)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="aot_eager", fullgraph=True)
    x = _tensors()[0]
    y = compiled(x)
    assert proofs == ["forward"]
    y.sum().backward()
    assert proofs == ["forward", "grad_weight"]
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias, 1, 1, 1, 8).relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_other_halves_of_layers_have_pytorchs_own_gradients(needs: tuple[bool, bool, bool]) -> None:
    """Off the CPU no product stands in for a convolution or a sum: settings of precision differ between them there."""
    x = torch.empty(2, 8, 5, 6, device="meta").contiguous(memory_format=torch.channels_last)
    weight, asked = torch.empty(4, 8, 1, 1, device="meta"), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    with Watch():
        grads = autograd._pointwise_grads(needs, torch.empty(2, 4, 5, 6, device="meta"), x, weight)
    assert [grad is not None for grad in grads] == list(needs)
    assert next(name for name in asked if name != "aten.empty") == "aten.convolution_backward"
    assert ("aten.sum" in asked) == needs[2]
    assert not {"aten.mm", "aten.bmm"} & set(asked)
    assert grads[1] is None or grads[1].stride() == weight.stride()
    image = torch.empty(2, 4, 5, 6, device="meta").contiguous(memory_format=torch.channels_last)
    with Watch():
        assert autograd._sum_to_bias(image).shape == (4,)
    assert asked[-1] == "aten.sum"
