"""Both gradients of a depthwise layer at channels_last in one walk, ours or PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_checks import channels_last, relative
from torch import Tensor
from torch.nn import functional as F

import sepconv
from sepconv.kernels.halide.conv import depthwise_choice
from sepconv.kernels.halide.jit import runtime
from sepconv.ops import convolutions
from sepconv.ops.explain import Explanation, record

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")


def _passes(
    size: tuple[int, ...], kernel: int, dtype: torch.dtype, bias: bool = False, stride: int = 1
) -> list[Explanation]:
    """Who computed a layer's passes, after its gradients were compared."""
    channels = size[1]
    x = channels_last(*size, dtype=dtype).requires_grad_()
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype).requires_grad_()
    leaves = [x, weight, *([torch.randn(channels).to(dtype).requires_grad_()] if bias else [])]
    with record() as seen:
        y = sepconv.depthwise_conv2d(*leaves, *([] if bias else [None]), stride, kernel // 2)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, grad)
    again = torch.autograd.grad(
        sepconv.depthwise_conv2d(*leaves, *([] if bias else [None]), stride, kernel // 2), leaves, grad
    )
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = F.conv2d(*exact, *([] if bias else [None]), stride, kernel // 2, groups=channels)
    true = torch.autograd.grad(y, exact, grad.double())
    for mine, unseen, truth in zip(found, again, true, strict=True):
        assert mine.dtype is dtype
        assert torch.equal(mine, unseen)
        assert relative(mine, truth) < (1e-5 if dtype is torch.float32 else 2**-7)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_one_walk_of_ours(dtype: torch.dtype) -> None:
    _, both = _passes((2, 16, 9, 11), 5, dtype, bias=True)
    assert (both.op, both.kernel, both.reasons) == ("depthwise_stage_gradients", "halide", {})


def test_in_one_call_of_pytorchs_where_filters_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise_choice, "slower_trained", lambda problem: "")
    _, both = _passes((4, 64, 56, 56), 3, torch.float32)
    assert both.kernel == "torch"
    assert "as fast" in both.reasons["halide"]


@pytest.mark.parametrize("bias", [False, True])
def test_small_filters_that_step_are_pytorchs_as_a_whole(bias: bool) -> None:
    """All three passes, with nothing of ours around them."""
    [whole] = _passes((4, 64, 27, 29), 3, torch.float32, bias, stride=2)
    assert (whole.op, whole.kernel) == ("depthwise_conv", "torch")
    assert whole.reasons["halide"].startswith("forward and back PyTorch's kernels take less time with 9 taps")


def test_a_separable_layer_keeps_what_is_between_where_its_filters_are_pytorchs() -> None:
    x = channels_last(4, 64, 27, 29).requires_grad_()
    weights = torch.randn(64, 1, 3, 3, requires_grad=True), torch.randn(8, 64, 1, 1, requires_grad=True)
    with record() as seen:
        y = sepconv.separable_conv2d(x, *weights, None, None, 2, 1, depthwise_activation="relu6", activation="relu")
        found = torch.autograd.grad(y.sum(), (x, *weights))
    assert [(choice.op, choice.kernel) for choice in seen[:2]] == [
        ("separable_conv", "depthwise, then pointwise"),
        ("depthwise_conv", "torch"),
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, *weights)]
    hidden = F.relu6(F.conv2d(exact[0], exact[1], None, 2, 1, groups=64))
    true = torch.autograd.grad(F.relu(F.conv2d(hidden, exact[2])).sum(), exact)
    for mine, truth in zip(found, true, strict=True):
        assert relative(mine, truth) < 1e-5


@pytest.mark.parametrize(
    ("size", "layout", "reason"),
    [
        ((2, 16, 9, 11), torch.contiguous_format, "on contiguous tensors it takes longer to compute"),
        ((2, 16, 9, 11), torch.channels_last, "it takes longer to compute the 12,672 bytes between again"),
        ((4, 16, 129, 127), torch.channels_last, "4,194,048 bytes less memory until the way back"),
    ],
    ids=["contiguous", "few bytes", "many bytes"],
)
def test_what_lies_between_two_convolutions_is_kept_or_computed_again(
    size: tuple[int, ...], layout: torch.memory_format, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "_MOST_KEPT", 4_194_047)
    leaves = [
        torch.randn(size).contiguous(memory_format=layout).requires_grad_(),
        *[torch.randn(shape).requires_grad_() for shape in ((16, 1, 5, 5), (8, 16, 1, 1), (16,), (8,))],
    ]
    options = {"padding": [2, 2], "depthwise_activation": "relu", "activation": "silu"}

    def gradients() -> tuple[Tensor, ...]:
        y = sepconv.separable_conv2d(*leaves, **options)
        return torch.autograd.grad(y.square().mean(), leaves)

    with record() as seen:
        found = gradients()
    kept = "takes longer" in reason
    first = seen[0]
    if kept:
        assert (first.op, first.kernel) == ("separable_conv", "depthwise, then pointwise")
        assert first.reasons["halide"].startswith(reason)
    else:
        assert (first.op, first.kernel, first.reasons) == (
            "separable_conv_between", "computed again", {"kept": reason}
        )  # fmt: skip
    parts = [choice.op for choice in seen[1:3]]
    assert parts == (["depthwise_conv", "pointwise_conv"] if kept else ["separable_conv", "depthwise_conv"])
    again = gradients(), gradients()  # once remembered, then from memory
    options["padding"][:] = [0, 0]  # what is remembered of a call is not the caller's list
    options["padding"] = [2, 2]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, dw, pw, dw_bias, pw_bias = exact
    hidden = F.relu(F.conv2d(x, dw, dw_bias, 1, 2, groups=16))
    true = torch.autograd.grad(F.silu(F.conv2d(hidden, pw, pw_bias)).square().mean(), exact)
    for mine, *others, truth in zip(found, *again, gradients(), true, strict=True):
        assert relative(mine, truth) < 1e-5
        assert all(torch.equal(mine, other) for other in others)


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((1, 64, 15, 17), 3, {"stride": 2, "padding": 1}),
        ((4, 64, 27, 29), 3, {"dilation": 2}),
        ((4, 64, 27, 29), 2, {"padding": "same"}),
    ],
    ids=["few numbers", "dilated", "padded at one side"],
)
def test_other_small_filters_are_trained_by_ours(size: tuple[int, ...], kernel: int, options: dict[str, Any]) -> None:
    x, weight = channels_last(*size).requires_grad_(), torch.randn(64, 1, kernel, kernel, requires_grad=True)
    with record() as seen:
        sepconv.depthwise_conv2d(x, weight, None, **options).sum().backward()
    assert "forward and back" not in str(seen[0])


def test_one_alone_is_an_operator_of_its_own() -> None:
    x, weight = channels_last(2, 16, 9, 11), torch.randn(16, 1, 5, 5, requires_grad=True)
    with record() as seen:
        sepconv.depthwise_conv2d(x, weight, None, 1, 2).sum().backward()
    assert [choice.op for choice in seen] == ["depthwise_conv", "depthwise_conv_grad_weight"]


def test_differentiated_twice_they_are_operators() -> None:
    x, weight = channels_last(1, 4, 5, 5).requires_grad_(), torch.randn(4, 1, 3, 3, requires_grad=True)
    grads = torch.autograd.grad(
        sepconv.depthwise_conv2d(x, weight, None, 1, 1).square().sum(), (x, weight), None, None, True
    )
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight))
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    grads = torch.autograd.grad(F.conv2d(*exact, None, 1, 1, groups=4).square().sum(), exact, create_graph=True)
    true = torch.autograd.grad(sum(grad.square().sum() for grad in grads), exact)
    for mine, truth in zip(second, true, strict=True):
        assert relative(mine, truth) < 1e-5


@pytest.mark.parametrize(
    ("size", "layout", "activation", "reason"),
    [
        ((8, 32, 32, 33), torch.contiguous_format, "relu", "on contiguous tensors"),
        ((4, 32, 9, 11), torch.channels_last, "relu", "for 396 pixels"),
        ((8, 32, 32, 33), torch.channels_last, None, "no more time"),
        ((8, 32, 32, 33), torch.channels_last, "relu", ""),
    ],
)
def test_products_are_pytorchs_where_nothing_is_saved(
    size: tuple[int, ...], layout: torch.memory_format, activation: str | None, reason: str
) -> None:
    x = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
    leaves = x, torch.randn(24, 32, 1, 1, requires_grad=True), torch.randn(24, requires_grad=True)
    with record() as seen:
        y = sepconv.pointwise_conv2d(*leaves, activation=activation)
        found = torch.autograd.grad(y.square().sum(), leaves)
    assert (seen[0].op, seen[0].kernel) == ("pointwise_conv", "torch" if reason else "halide")
    assert reason in seen[0].reasons.get("halide", "")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = F.conv2d(*exact)
    true = torch.autograd.grad((y.relu() if activation else y).square().sum(), exact)
    for mine, truth in zip(found, true, strict=True):
        assert relative(mine, truth) < 1e-5
