"""Depthwise, pointwise and separable convolution of numbers with 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_checks import depthwise_case
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv
from sepconv import reference
from sepconv.kernels.halide.conv import depthwise
from sepconv.kernels.torch import aten
from sepconv.ops import call
from sepconv.ops.explain import HALF, record
from sepconv.ops.geometry import resolve

OURS = {1: sepconv.depthwise_conv1d, 2: sepconv.depthwise_conv2d, 3: sepconv.depthwise_conv3d}
THEIRS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
TORCH, HALIDE = "torch", "halide"
ALL_OURS = [
    # kernel, stride, dilation, multiplier, channels_last
    ((3, 3), 1, 1, 1, True),
    ((3, 3), 1, 1, 2, False),
    ((3, 3), 2, 1, 3, True),
    ((3, 2), (1, 2), 1, 1, True),
    ((3, 3), 1, 2, 1, False),
    ((5, 5), 2, 1, 1, False),
    ((1, 7), 1, 1, 1, True),
    ((4,), 1, 1, 1, False),
    ((15,), 2, 1, 2, False),
    ((2, 3, 3), 1, 1, 1, False),
    ((2, 3, 3), 2, 1, 2, True),
]
# Strides, dilations, multipliers, signals, volumes and both layouts are among the others, too.
MORE = (ALL_OURS[3], ALL_OURS[5], ALL_OURS[6], ALL_OURS[7], ALL_OURS[10])
MOST = ALL_OURS[1:3]
LONG: tuple[Any, Any] = ((), pytest.mark.slow)


KERNEL_OF_PASSES = {
    # forward, grad_input and grad_weight; of images at channels_last both gradients in one walk
    **dict.fromkeys(ALL_OURS, (HALIDE, HALIDE, HALIDE)),
    **dict.fromkeys((ALL_OURS[0], ALL_OURS[3], ALL_OURS[6]), (HALIDE, HALIDE)),
    ((3, 3), 2, 1, 1, False): (HALIDE, HALIDE, TORCH),
}


def tensors(case: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, filters and bias as views of larger tensors: leaves that need gradients."""
    kernel, _, _, multiplier, channels_last = case
    wide = torch.randn(2, 9, *(13, 17, 11)[: len(kernel)]).to(dtype)
    if channels_last:
        wide = wide.contiguous(memory_format=FORMATS[len(kernel)])
    filters = 7 * multiplier
    weight, bias = torch.randn(filters, 2, *kernel).to(dtype)[:, 1:], torch.randn(2 * filters).to(dtype)[::2]
    return tuple(t.detach().requires_grad_() for t in (wide[:, 1:8], weight, bias))


def small_numbers(y: Tensor) -> Tensor:
    """A gradient that any dtype holds exactly."""
    return (torch.arange(y.numel()).view_as(y) % 7 - 3).to(y.dtype)


def run(
    convolution: Callable[..., Tensor], case: Any, leaves: Sequence[Tensor], *groups: int, like: Any = small_numbers
) -> list[Tensor]:
    """The result and the gradients of x, filters and bias."""
    kernel, stride, dilation, _, _ = case
    y = convolution(*leaves, stride, [k // 2 for k in kernel], dilation, *groups)
    return [y, *torch.autograd.grad(y, leaves, like(y))]


@pytest.mark.parametrize(
    ("case", "kernels", "dtype"),
    [
        *(pytest.param(*item, torch.bfloat16, marks=LONG[item[0] in MORE]) for item in KERNEL_OF_PASSES.items()),
        *(pytest.param(case, (HALIDE, HALIDE, HALIDE), torch.float16, marks=LONG[i]) for i, case in enumerate(MOST)),
    ],
    ids=str,
)
def test_each_pass_is_computed_where_it_is_fast(case: Any, kernels: tuple[str, ...], dtype: torch.dtype) -> None:
    leaves = tensors(case, dtype)
    with record() as choices:
        found = run(OURS[len(case[0])], case, leaves)
    assert tuple(choice.kernel for choice in choices) == kernels
    for choice in choices:
        by_us = choice.kernel == HALIDE
        assert choice.schedule.get("numbers") == (str(dtype).removeprefix("torch.") if by_us else None)
        assert by_us or choice.reasons["halide"]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = run(THEIRS[len(case[0])], case, exact, 7)
    positive = [t.detach().abs().requires_grad_() for t in exact]
    magnitude = run(THEIRS[len(case[0])], case, positive, 7, like=lambda y: small_numbers(y).abs())
    terms = 2 * 13 * 17 * 11
    for ours, right, most in zip(found, truth, magnitude, strict=True):
        assert ours.dtype == dtype
        # Rounded to 16 bits once; the sum before it in float32.
        bound = torch.finfo(dtype).eps * right.abs() + terms * torch.finfo(torch.float32).eps * most.abs()
        assert bool(((ours.double() - right).abs() <= bound + torch.finfo(dtype).tiny).all())


def test_reference_agrees_with_the_truth_used_here() -> None:
    case = ((3, 2), (1, 2), 1, 2, False)
    x, w, b = (t.detach().double() for t in tensors(case, torch.bfloat16))
    g = resolve("test", 2, (3, 2), (1, 2), (1, 1), 1)
    truth = reference.depthwise_conv(x, w, b, g.stride, g.padding, g.dilation)
    torch.testing.assert_close(F.conv2d(x, w, b, (1, 2), (1, 1), 1, 7), truth)


@pytest.mark.parametrize(
    ("channels", "side", "kernel", "dilation", "reason"),
    [
        (8, 28, 3, 1, ""),
        (128, 56, 3, 1, "PyTorch's forward kernel is as fast with 9 taps on channels_last tensors of bfloat16"),
        (128, 56, 3, 2, ""),
        (128, 56, 5, 1, ""),
        (768, 7, 7, 1, "as fast with 49 taps"),
    ],
)
def test_large_channels_last_images_go_forward_through_pytorch(
    channels: int, side: int, kernel: int, dilation: int, reason: str
) -> None:
    x = torch.empty(32, channels, side, side, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(channels, 1, kernel, kernel, device="meta")
    padding = ((dilation * (kernel // 2),) * 2,) * 2
    walk = ((1, 1), padding, (dilation, dilation))
    found = depthwise.slower(depthwise_case("forward", x, weight, *walk))
    assert reason in found
    assert bool(found) == bool(reason)
    assert depthwise.slower(depthwise_case("grad_input", x, weight, *walk, size=x.shape)) == ""
    assert depthwise.slower(depthwise_case("grad_weight", x, x, *walk, size=weight.shape)) == ""


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_and_infinity_and_rounding(dtype: torch.dtype, channels_last: bool) -> None:
    """A filter of one tap of value 1 gives back what it is given; of value 1/3 what float32 gives, rounded."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, 16, 64, 64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for value in (1.0, 1 / 3):
        weight = torch.full((16, 1, 1, 1), value).to(dtype)
        y = sepconv.depthwise_conv2d(x, weight)
        assert sepconv.explain(sepconv.depthwise_conv2d, x, weight)[0].kernel == HALIDE
        expected = (x.float() * weight.float().view(1, 16, 1, 1)).to(dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_calls_of_other_numbers_are_remembered_apart() -> None:
    x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3)
    for _ in range(3):
        for dtype in (torch.float32, *HALF):
            y = sepconv.depthwise_conv2d(x.to(dtype), w.to(dtype))
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), F.conv2d(x, w, groups=8), rtol=0.02, atol=0.1)
    known = call.key((x.bfloat16(), w.bfloat16(), None), "depthwise", 2, 1, 0, 1, None)
    assert call.find(known) is not None


@pytest.mark.parametrize("make", [lambda: sepconv.DepthwiseConv2d(6, 5), lambda: sepconv.SeparableConv2d(6, 8, 5)])
def test_training_under_autocast_keeps_16_bits(make: Callable[[], Any]) -> None:
    """What waits for the backward pass is as small as PyTorch's, and every parameter gets its float32 gradient."""
    layer, x = make(), torch.randn(2, 6, 19, 17)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), record() as choices:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
    assert [c.kernel for c in choices if c.op.startswith("depthwise_conv")] == [HALIDE, HALIDE]
    images = {t.dtype for t in kept if t.shape[-2:] == x.shape[-2:]}
    assert images == {torch.bfloat16}
    mine = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert mine[name].dtype == torch.float32
        torch.testing.assert_close(mine[name], parameter.grad, rtol=0.05, atol=0.02 * float(parameter.grad.abs().max()))


def test_compiles_without_graph_breaks() -> None:
    def function(x: Tensor, dw: Tensor, pw: Tensor) -> Tensor:
        return sepconv.separable_conv2d(x, dw, pw, stride=2, depthwise_activation="relu", activation="silu")

    made = [torch.randn(2, 6, 9, 7), torch.randn(12, 1, 3, 3), torch.randn(5, 12, 1, 1)]
    leaves = [t.bfloat16().requires_grad_() for t in made]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    for grad, truth in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(grad, truth)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("channels", "side", "channels_last", "units", "by_matrix"),
    [
        (97, 3, True, True, True),
        (97, 3, True, False, False),
        (95, 3, True, True, False),
        (5, 15, False, True, True),
        (5, 14, False, True, False),
        (5, 15, False, False, False),
    ],
)
def test_pointwise_is_a_product_of_matrices_where_that_is_faster(
    channels: int,
    side: int,
    channels_last: bool,
    units: bool,
    by_matrix: bool,
    with_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aten, "HAS_BF16", units)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, channels, side, side).bfloat16().contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(101, channels, 1, 1).bfloat16().requires_grad_()
    bias = torch.randn(101).bfloat16().requires_grad_() if with_bias else None
    residual = torch.randn(3, 101, side, side).bfloat16().contiguous(memory_format=layout).requires_grad_()
    leaves = [t for t in (x, w, bias, residual) if t is not None]
    with Operators() as operators:
        y = sepconv.pointwise_conv2d(x, w, bias, activation="relu", residual=residual)
    assert ("convolution" in operators.names) != by_matrix
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=layout)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = (F.conv2d(exact[0], exact[1], exact[2] if with_bias else None) + exact[-1]).relu()
    eps = torch.finfo(torch.bfloat16).eps
    # Two roundings: of the product and of the sum with the residual, at most as large as all terms together.
    magnitude = F.conv2d(exact[0].abs(), exact[1].abs(), exact[2].abs() if with_bias else None) + exact[-1].abs()
    assert bool(((y.double() - truth).abs() <= eps * magnitude).all())
    ours, right = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(truth.sum(), exact)
    for mine, correct in zip(ours, right, strict=True):
        assert float((mine.double() - correct).norm() / correct.norm()) < 8 * eps


def test_pointwise_of_no_images() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(0, 97, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=layout)
        assert sepconv.pointwise_conv2d(x, torch.randn(5, 97, 1, 1).bfloat16()).shape == (0, 5, 16, 16)
