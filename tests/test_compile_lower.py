"""Who computes a group: the first in the list of backends that can and is not slower, as for the functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from networks import NETWORKS, SamePadded, randomise
from torch import Tensor, nn

from sepconv import depthwise_conv2d, explain, pointwise_conv2d
from sepconv.compile import compile
from sepconv.compile.groups import Convolution, Epilogue, SeparableGroup
from sepconv.compile.lower import lower
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.numbers import FLOAT32
from sepconv.compile.program import Place, Program, ProgramStep, TensorForm
from sepconv.compile.slices import Slices
from sepconv.compile.store import Constant
from sepconv.kernels import backends
from sepconv.kernels.backends import Backend, Binder
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.jit import runtime


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """Kernels are chosen for one test alone."""
    backends.forget()
    yield
    backends.forget()


class Planned(NamedTuple):
    case: Case
    variant: str = "as they are"


def packed(plan: Planned, weights: Sequence[Tensor | None]) -> Any:
    return list(weights)


def bound(plan: Planned, x: Tensor, weights: Any, residual: Tensor | None, out: Tensor) -> Any:
    """A product of matrices by PyTorch, as a kernel would be bound."""

    def run() -> None:
        matrix, bias = weights
        out.copy_(nn.functional.conv2d(x, matrix, bias) + (0.0 if residual is None else residual))

    return run


FAKE = Backend("fake", prepare=lambda case: pytest.fail("prepared"), binder=Binder(Planned, packed, bound))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_compile_takes_the_first_backend_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "pointwise", [FAKE, *backends.BACKENDS["pointwise"]])
    model, x = Residual().eval(), torch.randn(2, 8, 5, 5)
    fast = compile(model, x)
    assert [group.kernel for group in fast.explain().groups] == ["fake"]
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("question", ["supports", "slower"])
def test_compile_says_why_a_backend_was_passed_over(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing: dict[str, Callable[[Case], str]] = {question: lambda case: "it is Tuesday"}
    only = [replace(FAKE, **refusing), backends.BACKENDS["pointwise"][-1]]  # type: ignore[arg-type]
    monkeypatch.setitem(backends.BACKENDS, "pointwise", only)
    model, x = Residual().eval(), torch.randn(2, 8, 5, 5)
    fast = compile(model, x)
    assert [(group.kernel, group.reason) for group in fast.explain().groups] == [("torch", "it is Tuesday")]
    torch.testing.assert_close(fast(x), model(x))


def test_compile_asks_the_list_about_every_kind_of_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[Case]] = {}

    def supports(case: Case) -> str:
        asked.setdefault(case.op, []).append(case)
        return "only asked"

    for op, known in backends.BACKENDS.items():
        monkeypatch.setitem(backends.BACKENDS, op, [replace(FAKE, supports=supports), known[-1]])
    for name in ("mobilenet_v2", "convnext_block", "squeeze_excite"):
        make, inputs = NETWORKS[name]
        fast = compile(randomise(make()), inputs())
        ours = [group for group in fast.explain().groups if "." not in group.kind]
        assert {(group.kernel, group.reason) for group in ours if group.kind != "copy"} == {("torch", "only asked")}
    assert set(asked) == {"depthwise", "pointwise", "normal", "separable", "pool", "elementwise", "row_norm"}
    assert all(case.bound for cases in asked.values() for case in cases)


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
def test_a_separable_group_is_computed_in_turn_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = backends.BACKENDS["separable"]
    slower = replace(first, slower=lambda case: "it is Tuesday")
    monkeypatch.setitem(backends.BACKENDS, "separable", [slower, *others])
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    fast = compile(model, x)
    network = next(iter(fast._networks.values()))
    assert isinstance(network, PreparedNetwork)
    [_, lowered] = network.lowered
    assert [kernel.case.op for kernel in lowered.kernels] == ["depthwise", "pointwise"]
    assert lowered.kernels[0].case.result == lowered.kernels[1].case.x
    assert (lowered.kernel, lowered.reason) == ("halide", "it is Tuesday")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def conv(channels: int, multiplier: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels * multiplier, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
    )


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (conv(16, 1, 3), (1, 16, 9, 9), ""),
        (conv(16, 9, 3), (1, 16, 9, 9), "each of the 9 filters of a channel would be code of its own"),
        (conv(256, 1, 7), (48, 256, 8, 8), "PyTorch's forward kernel is faster on channels_last planes of 64 pixels"),
        (nn.Conv2d(256, 256, 1, bias=False), (1, 256, 16, 16), ""),
    ],
)
def test_compile_and_the_functions_agree(layer: nn.Conv2d, shape: tuple[int, ...], reason: str) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    [group] = [group for group in compile(layer.eval(), x).explain().groups if group.kind != "copy"]
    function = depthwise_conv2d if layer.groups > 1 else pointwise_conv2d
    options: dict[str, Any] = {"padding": layer.padding} if layer.groups > 1 else {}
    with torch.no_grad():
        [call] = explain(function, x, layer.weight, **options)
    assert group.kernel == call.kernel == ("torch" if reason else "halide")
    assert group.reason == call.reasons.get("halide", "")
    assert group.reason.startswith(reason)


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
@pytest.mark.parametrize(
    ("layer", "shape", "cost"),
    [
        (conv(64, 1, 3), (2, 64, 96, 96), "as fast with 9 taps"),  # and its result would have to be copied
        (nn.Conv2d(8, 8, 1, bias=False), (1, 8, 3, 3), "comparing its packed weights"),  # which a bound call does not
    ],
)
def test_compile_does_not_pay_what_a_single_call_costs(layer: nn.Conv2d, shape: tuple[int, ...], cost: str) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    groups = compile(layer.eval(), x).explain().groups
    assert [group.kernel for group in groups if group.kind != "copy"] == ["halide"]
    with torch.no_grad():
        [call] = (
            explain(depthwise_conv2d, x, layer.weight, padding=1)
            if layer.groups > 1
            else explain(pointwise_conv2d, x, layer.weight)
        )
    assert cost in call.reasons["halide"]


def _place(shape: tuple[int, ...], memory: int) -> Place:
    stride = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
    return Place(TensorForm(shape, stride, FLOAT32), memory)


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
@pytest.mark.parametrize(("size", "kernel"), [(16, "halide"), (8000, "torch")])
def test_kernels_are_chosen_without_memory(size: int, kernel: str) -> None:
    """An image of 16 GB, which is nowhere, is too large for a kernel that counts in 32 bits."""
    depthwise = Convolution(
        Constant(torch.randn(64, 1, 3, 3), "first"), Epilogue(), Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)), 64
    )
    pointwise = Convolution(Constant(torch.randn(8, 64, 1, 1), "second"), Epilogue(), Geometry.of_pixels(2))
    image, out = _place((1, 64, size, size), 0), _place((1, 8, size, size), 1)
    step = ProgramStep(SeparableGroup(depthwise, pointwise), (image,), (out,))
    program = Program((step,), (image,), (image.form,), (), (image.form.bytes, out.form.bytes))
    [lowered] = lower(program, Slices())
    assert lowered.kernel == kernel
    assert ("indexes with 32 bits" in lowered.reason) == (kernel == "torch")


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
def test_small_steps_are_computed_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("sepconv.compile.lower")
    monkeypatch.setattr(module, "FEW_MACS", 100_000)
    small = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)]
    model, x = nn.Sequential(*small, nn.Conv2d(8, 64, 3)).eval(), torch.randn(1, 8, 9, 9)
    threads = [_threads(compile(model, x, threads=count)) for count in (1, 2)]
    assert threads == [[1, 1, 1], [1, 1, 2]]
    monkeypatch.setattr(module, "FEW_NUMBERS", 2 * 8 * 9 * 9 - 1)
    assert _threads(compile(model, x, threads=2)) == [2, 2, 2]


def _threads(fast: Any) -> list[int]:
    """Of all kernels, those inside of a separable one as well."""
    cases = [kernel.case for step in next(iter(fast._networks.values())).lowered for kernel in step.kernels]
    return [half.threads for case in cases for half in (case, case.then) if half is not None]
