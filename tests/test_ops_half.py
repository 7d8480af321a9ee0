"""Depthwise and separable convolution of numbers with 16 bits: PyTorch's kernels, or ours in float32, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv
from sepconv import reference
from sepconv.choices import HALF, record
from sepconv.kernels import aten
from sepconv.shapes import resolve

OURS = {1: sepconv.depthwise_conv1d, 2: sepconv.depthwise_conv2d, 3: sepconv.depthwise_conv3d}
THEIRS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
TORCH, HALIDE = "torch", "halide"
ALL = (HALIDE, HALIDE, HALIDE)
KERNEL_OF_PASSES = {
    # kernel, stride, dilation, multiplier, channels_last: who computes forward, grad_input and grad_weight
    ((3, 3), 1, 1, 2, False): ALL,
    ((3, 3), 2, 1, 3, True): ALL,
    ((3, 3), 2, 1, 1, False): (TORCH, HALIDE, TORCH),
    ((3, 2), (1, 2), 1, 1, True): (TORCH, HALIDE, TORCH),
    ((3, 3), 1, 2, 1, True): (TORCH, HALIDE, HALIDE),
    ((1, 5), 1, 1, 1, False): (TORCH, TORCH, HALIDE),
    ((5, 5), 1, 1, 1, True): (TORCH, HALIDE, HALIDE),
    ((5, 5), 1, 1, 1, False): ALL,
    ((15,), 1, 1, 1, False): ALL,
    ((4,), 1, 1, 1, False): (TORCH, TORCH, HALIDE),
    ((2, 3, 3), 1, 1, 1, False): (TORCH, HALIDE, HALIDE),
    ((2, 3, 3), 1, 1, 1, True): (TORCH, HALIDE, HALIDE),
    ((2, 3, 3), 1, 1, 2, True): ALL,
}
KEPT = [((3, 3), 1, 1, 1, False), ((3, 3), 1, 1, 1, True), ((5, 3), 1, 1, 1, True), ((2,), 1, 1, 1, False)]
"""All three passes are PyTorch's."""


def tensors(case: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x as a view of the middle channels of a larger image, filters, bias: leaves that need gradients."""
    kernel, _, _, multiplier, channels_last = case
    wide = torch.randn(2, 9, *(13, 17, 11)[: len(kernel)]).to(dtype)
    if channels_last:
        wide = wide.contiguous(memory_format=FORMATS[len(kernel)])
    made = (wide[:, 1:8], torch.randn(7 * multiplier, 1, *kernel).to(dtype), torch.randn(7 * multiplier).to(dtype))
    return tuple(t.requires_grad_() for t in made)


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


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("case", "kernels"), KERNEL_OF_PASSES.items(), ids=str)
def test_each_pass_is_computed_where_it_is_fast(case: Any, kernels: tuple[str, ...], dtype: torch.dtype) -> None:
    leaves = tensors(case, dtype)
    with record() as choices:
        found = run(OURS[len(case[0])], case, leaves)
    assert tuple(choice.kernel for choice in choices) == kernels
    for choice in choices:
        by_us = choice.kernel == HALIDE
        assert choice.schedule.get("converted_from") == (str(dtype) if by_us else None)
        assert by_us or "16 bits" in choice.reasons["halide"]
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


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_where_pytorch_is_fast_its_own_operators_run(case: Any) -> None:
    leaves = tensors(case, torch.bfloat16)
    with record() as choices:
        y = OURS[len(case[0])](*leaves)
    assert [choice.kernel for choice in choices] == [TORCH]
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"


def test_without_gradients_only_the_forward_pass_decides() -> None:
    leaves = tensors(((3, 3), 2, 1, 1, True), torch.bfloat16)
    with record() as choices:
        assert type(sepconv.depthwise_conv2d(*leaves, 2).grad_fn).__name__ != "ConvolutionBackward0"
        with torch.no_grad():
            sepconv.depthwise_conv2d(*leaves, 2)
    assert [choice.kernel for choice in choices] == [TORCH, TORCH]


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
    images = [t.dtype for t in kept if t.dim() == 4 and t.shape[-2:] == x.shape[-2:]]
    assert images
    assert set(images) == {torch.bfloat16}
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
