"""The public functions on a device that has Triton's kernels. Without a GPU the CPU takes its place: the programs are
interpreted, and what a proof measures is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_run
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton_checks import DEVICE, kernel, needs_triton
from triton_pretence import FASTER, pretend

import sepconv
from sepconv.bench import operations, tables
from sepconv.bench.operations import OpCase
from sepconv.kernels.backends import BACKENDS
from sepconv.kernels.triton import depthwise, events, verdicts
from sepconv.kernels.triton.events import Times
from sepconv.ops import autograd, call
from sepconv.system.timing import Timing

pytestmark = needs_triton

_TIMES = dict(FASTER)


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The passes that were proven."""
    yield pretend(monkeypatch, tmp_path, _TIMES)
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


def test_no_code_for_other_addresses_is_loaded_while_a_graph_is_captured(
    proofs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of contiguous images Triton makes two: for addresses that 16 divides, and for others."""
    memory, (_, weight, bias), known = torch.randn(1000).to(DEVICE), _tensors(), []
    even, odd = memory[:240].view(1, 8, 5, 6), memory[1:241].view(1, 8, 5, 6)
    sepconv.depthwise_conv2d(even, weight, bias)
    monkeypatch.setattr(depthwise, "_captures", lambda device: True)
    for x in (even, odd):
        known += sepconv.explain(sepconv.depthwise_conv2d, x, weight, bias)
    assert [one.kernel for one in known] == ["triton", "torch"]
    assert known[1].reasons["triton"] == (
        "a CUDA graph is captured, and no call before had its tensors at such addresses"
    )
    assert proofs == ["forward"]


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
def test_under_autocast_gradients_have_16_bits_too_and_those_of_weights_their_own(proofs: list[str]) -> None:
    given, found = _tensors(), []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        told = sepconv.explain(lambda: found.extend(_run(*given)))
    assert [one.kernel for one in told] == ["triton"] * 3
    assert proofs == ["forward", "grad_input", "grad_weight"]
    assert [t.dtype for t in found] == [torch.bfloat16, *[torch.float32] * 3]
    for ours, theirs in zip(found, _by_pytorch(*given), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.5)


def test_a_batch_of_no_images_is_pytorchs(proofs: list[str]) -> None:
    x, weight, bias = _tensors()
    empty = x[:0].requires_grad_()
    told = sepconv.explain(lambda: sepconv.depthwise_conv2d(empty, weight, bias, padding=1).sum().backward())
    assert {one.kernel for one in told} == {"torch"}
    assert told[0].reasons["triton"] == "there is nothing to compute"
    assert empty.grad is not None
    assert empty.grad.shape == (0, 8, 5, 6)
    assert proofs == []


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


@pytest.mark.slow
def test_a_graph_of_sizes_that_are_not_known_proves_each_of_them(proofs: list[str]) -> None:
    """Once, in a graph for many sizes, and with the strides that it was promised."""
    layer = sepconv.DepthwiseConv2d(8, 3, padding=1, device=DEVICE)
    compiled = torch.compile(nn.Sequential(layer, nn.SiLU()), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, again in [(5, False), (7, False), (6, False), (5, True)]:
        for form in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(2, 8, rows, 9).to(DEVICE).contiguous(memory_format=form).requires_grad_()
            done = len(proofs)
            y = compiled(x)
            y.square().sum().backward()
            assert proofs[done:] == ([] if again else ["forward", "grad_input", "grad_weight"])
            assert y.is_contiguous(memory_format=form)
            leaf = x.detach().requires_grad_()
            known = F.silu(F.conv2d(leaf, layer.weight.detach(), layer.bias.detach(), 1, 1, 1, 8))
            known.square().sum().backward()
            torch.testing.assert_close(y, known, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of Inductor
def test_inductor_gets_the_strides_that_it_was_promised(proofs: list[str]) -> None:
    """It asserts the strides of what our operators return, in both layouts, forward and back."""
    layer = sepconv.DepthwiseConv2d(8, 3, stride=2, padding=1, device=DEVICE)
    network = nn.Sequential(nn.Conv2d(4, 8, 1), layer, nn.SiLU(), nn.Conv2d(8, 2, 1)).to(DEVICE)
    compiled = torch.compile(network, fullgraph=True)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 9, 7).to(DEVICE).contiguous(memory_format=form).requires_grad_()
        y = compiled(x)
        [grad] = torch.autograd.grad(y.square().sum(), x)
        known = network(x)
        torch.testing.assert_close(y, known, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, torch.autograd.grad(known.square().sum(), x)[0], rtol=1e-4, atol=1e-3)
    assert set(proofs) == {"forward", "grad_input", "grad_weight"}


@pytest.mark.slow
@pytest.mark.parametrize("rerun", [False, True], ids=["", "reentrant"])
def test_checkpoints_compute_the_same_again(proofs: list[str], rerun: bool) -> None:
    layer = sepconv.DepthwiseConv2d(8, 3, padding=1, device=DEVICE)
    x = _tensors()[0].requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    plain, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=rerun).square().sum().backward()
    assert torch.equal(plain, x.grad)


@pytest.mark.slow
def test_the_suite_of_operations_prints_its_table(
    proofs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command, with the interpreted kernels in the place of a card's."""
    make = operations.make_tensors
    monkeypatch.setattr(operations, "make_tensors", lambda case, form, dtype, device: make(case, form, dtype, DEVICE))
    monkeypatch.setattr(operations, "CASES", [OpCase(1, 8, (7, 5), (3, 3)), OpCase(1, 8, (9,), (4,), multiplier=2)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imaginary 1000")
    times = {"torch": 1.0, "sepconv": 0.5}

    def timed(calls: Any, seconds: float, device: torch.device) -> dict[str, Timing]:
        assert device.type == "cuda"
        return {name: Timing(*[times[name.partition("-")[0]]] * 3, 7) for name in calls}

    monkeypatch.setattr(events, "interleaved", timed)
    written = tmp_path / "ops.json"
    ran = cli_run.sepconv("bench", "ops", "--device", "cuda", "--dtype", "bfloat16", "--json", written)
    assert ran.code == 0, ran.err
    found = tables.read(written)
    assert {row["kernel"] for row in found["records"] if row["contender"] == "sepconv"} == {"triton"}
    assert found["command"].startswith("sepconv bench ops --dtype bfloat16 --device cuda")
    assert "2.00" in ran.out + ran.err
    assert len(proofs) == 3 * 2 + 3


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
