"""The derivatives of the operators: each gradient is an operator of its own, testable alone and differentiable again.

Where a transformation comes after the forward pass (``tracing``), the backward pass is made of PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.layout import is_channels_last
from sepconv.kernels.torch import aten
from sepconv.ops import direct, dispatch, tracing
from sepconv.ops.schema import DEPTHWISE, GRAD_INPUT, GRAD_WEIGHT, LIBRARY, POINTWISE


def _before_activation(grad: Tensor, activation: str, y: Tensor, compute_z: Callable[[], Tensor]) -> Tensor:
    """The gradient in front of an activation, whose input is computed again where the output does not tell."""
    known = ACTIVATIONS[activation]
    return known.backward(grad, y if known.from_output else compute_z())


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the weight's strides, also in dimensions of size 1, which DistributedDataParallel compares."""
    if grad.stride() == weight.stride() or not (weight.is_contiguous() and grad.is_contiguous()):
        return grad
    return grad.as_strided(weight.shape, weight.stride())


def _sum_to_bias(grad: Tensor) -> Tensor:
    if not is_channels_last(grad):
        return grad.sum([0, *range(2, grad.dim())])
    # A product with ones takes half the time of PyTorch's sum over the first dimension.
    pixels = _pixels(grad)
    return (pixels.new_ones(1, len(pixels)) @ pixels)[0]


def depthwise_grad_input(grad_output: Tensor, weight: Tensor, *sizes_and_geometry: Any) -> Tensor:
    """The operator's result, without the operator where nobody would notice."""
    run = dispatch.depthwise_grad_input if direct.possible(grad_output, weight) else GRAD_INPUT
    grad: Tensor = run(grad_output, weight, *sizes_and_geometry)
    return grad


def depthwise_grad_weight(grad_output: Tensor, x: Tensor, *sizes_and_geometry: Any) -> Tensor:
    """The operator's result, without the operator where nobody would notice."""
    run = dispatch.depthwise_grad_weight if direct.possible(grad_output, x) else GRAD_WEIGHT
    grad: Tensor = run(grad_output, x, *sizes_and_geometry)
    return grad


def _depthwise_grads(
    need: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        depthwise_grad_input(grad, weight, x.shape, *geometry) if need[0] else None,
        _laid_out_as(weight, depthwise_grad_weight(grad, x, weight.shape, *geometry)) if need[1] else None,
        _sum_to_bias(grad) if need[2] else None,
    )


def _pixels(x: Tensor) -> Tensor:
    """(N, C, *) -> (pixels, C), without a copy where x is channels_last."""
    return x.movedim(1, -1).flatten(0, -2)


def _pointwise_grads(
    need: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By PyTorch's matrix products, which need no packed copy of weights that change in every step."""
    matrix, grad_x, grad_weight = weight.flatten(1), None, None
    if need[0] and is_channels_last(grad):
        grad_x = (_pixels(grad) @ matrix).unflatten(0, (grad.shape[0], *grad.shape[2:])).movedim(-1, 1)
    elif need[0]:
        grad_x = (matrix.T @ grad.flatten(2)).unflatten(2, grad.shape[2:])
    if need[1] and is_channels_last(grad):
        # A row for each input channel, fewer than the outputs in most layers: 0.86 of the other product's time.
        grad_weight = (_pixels(x).T @ _pixels(grad)).T.contiguous().view_as(weight)
    elif need[1]:
        grad_weight = torch.einsum("nop,ncp->oc", grad.flatten(2), x.flatten(2)).view_as(weight)
    if grad_weight is not None:
        grad_weight = _laid_out_as(weight, grad_weight)
    return grad_x, grad_weight, _sum_to_bias(grad) if need[2] else None


def _composed_depthwise(walk: Sequence[Any], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator made of PyTorch's own."""
    stride, padding, dilation = walk
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return aten.depthwise_forward(x, weight, bias, stride, pairs, dilation)


def _composed_grads(
    compose: Callable[..., Tensor], grad: Tensor, tensors: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``compose(*tensors)``, by PyTorch's formulas for its own operators: all transformations know
    those."""
    with torch.enable_grad():
        # Under other names: one tensor may have been made of another, a way back that is not ours to go.
        named = [None if t is None else t.view_as(t) for t in tensors]
        y = compose(*named)
    wanted = [t for t, needed in zip(named, need, strict=True) if needed and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()) if wanted else ())
    return [next(grads) if needed and t is not None else None for t, needed in zip(named, need, strict=True)]


def _setup_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *geometry, activation = inputs
    ctx.save_for_backward(x, weight, bias, output if activation else None)
    ctx.geometry, ctx.activation = tuple(geometry), activation


def _backward_depthwise(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, y = ctx.saved_tensors
    if tracing.transformed(grad, x, weight):
        compose, tensors = partial(_composed_depthwise, ctx.geometry), (x, weight, bias)
        grad = _before_activation(grad, ctx.activation, y, lambda: compose(*tensors))
        return *_composed_grads(compose, grad, tensors, ctx.needs_input_grad[:3]), None, None, None, None
    grad = _before_activation(grad, ctx.activation, y, lambda: DEPTHWISE(x, weight, bias, *ctx.geometry, ""))
    return *_depthwise_grads(ctx.needs_input_grad, grad, x, weight, ctx.geometry), None, None, None, None


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, size, *geometry = inputs
    ctx.save_for_backward(grad_output, weight)
    ctx.geometry, ctx.size = tuple(geometry), size


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_output, weight = ctx.saved_tensors
    need, geometry = ctx.needs_input_grad, ctx.geometry
    if tracing.transformed(grad, grad_output, weight):
        stride, padding, dilation = geometry
        pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
        compose = aten.prepare_grad_input(ctx.size, stride, pairs, dilation)
        return *_composed_grads(compose, grad, (grad_output, weight), need[:2]), None, None, None, None
    of_output = DEPTHWISE(grad, weight, None, *geometry, "") if need[0] else None
    of_weight = GRAD_WEIGHT(grad_output, grad, weight.shape, *geometry) if need[1] else None
    return of_output, of_weight, None, None, None, None


def _setup_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, x, size, *geometry = inputs
    ctx.save_for_backward(grad_output, x)
    ctx.geometry, ctx.size = tuple(geometry), size


def _backward_grad_weight(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_output, x = ctx.saved_tensors
    need, geometry = ctx.needs_input_grad, ctx.geometry
    if tracing.transformed(grad, grad_output, x):
        stride, padding, dilation = geometry
        pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
        compose = aten.prepare_grad_weight(ctx.size, x.shape[1], stride, pairs, dilation)
        return *_composed_grads(compose, grad, (grad_output, x), need[:2]), None, None, None, None
    of_output = DEPTHWISE(x, grad, None, *geometry, "") if need[0] else None
    of_x = GRAD_INPUT(grad_output, grad, x.shape, *geometry) if need[1] else None
    return of_output, of_x, None, None, None, None


def _setup_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, activation = inputs
    from_output = ACTIVATIONS[activation].from_output
    ctx.save_for_backward(x, weight, bias, None if from_output else residual, output if activation else None)
    ctx.activation = activation


def _backward_pointwise(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, residual, y = ctx.saved_tensors
    need = ctx.needs_input_grad
    if tracing.transformed(grad, x, weight):
        conv = aten.pointwise_forward
        grad = _before_activation(grad, ctx.activation, y, lambda: conv(x, weight, bias, "", residual))
        return *_composed_grads(conv, grad, (x, weight, bias), need[:3]), grad if need[3] else None, None
    grad = _before_activation(grad, ctx.activation, y, lambda: POINTWISE(x, weight, bias, residual, ""))
    return *_pointwise_grads(need, grad, x, weight), grad if need[3] else None, None


def _setup_separable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dw, pw, dw_bias, pw_bias, residual, *geometry, dw_activation, activation = inputs
    from_output = ACTIVATIONS[activation].from_output
    ctx.save_for_backward(
        x, dw, pw, dw_bias, pw_bias, None if from_output else residual, output if activation else None
    )
    ctx.geometry, ctx.activations = tuple(geometry), (dw_activation, activation)


def _backward_separable(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The depthwise result is computed again instead of kept: it would be the largest tensor of the layer."""
    x, dw, pw, dw_bias, pw_bias, residual, y = ctx.saved_tensors
    need, (dw_activation, activation) = ctx.needs_input_grad, ctx.activations
    if tracing.transformed(grad, x, dw, pw):
        return _backward_composed_separable(ctx, grad)
    between = ACTIVATIONS[dw_activation]
    hidden = z = DEPTHWISE(x, dw, dw_bias, *ctx.geometry, dw_activation if between.from_output else "")
    if not between.from_output:
        hidden = between.function(z)
    grad = _before_activation(grad, activation, y, lambda: POINTWISE(hidden, pw, pw_bias, residual, ""))
    below = need[0] or need[1] or need[3]
    grad_hidden, grad_pw, grad_pw_bias = _pointwise_grads((below, need[2], need[4]), grad, hidden, pw)
    grad_x = grad_dw = grad_dw_bias = None
    if below:
        assert grad_hidden is not None
        grad_hidden = _before_activation(grad_hidden, dw_activation, hidden, lambda: z)
        needs = (need[0], need[1], need[3])
        grad_x, grad_dw, grad_dw_bias = _depthwise_grads(needs, grad_hidden, x, dw, ctx.geometry)
    grad_residual = grad if need[5] else None
    return grad_x, grad_dw, grad_pw, grad_dw_bias, grad_pw_bias, grad_residual, None, None, None, None, None


def _backward_composed_separable(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, dw, pw, dw_bias, pw_bias, residual, y = ctx.saved_tensors
    need, (dw_activation, activation) = ctx.needs_input_grad, ctx.activations

    def compose(x: Tensor, dw: Tensor, pw: Tensor, dw_bias: Any, pw_bias: Any, residual: Any = None) -> Tensor:
        hidden = ACTIVATIONS[dw_activation].function(_composed_depthwise(ctx.geometry, x, dw, dw_bias))
        return aten.pointwise_forward(hidden, pw, pw_bias, "", residual)

    tensors = (x, dw, pw, dw_bias, pw_bias)
    grad = _before_activation(grad, activation, y, lambda: compose(*tensors, residual))
    grads = _composed_grads(compose, grad, tensors, need[:5])
    return *grads, grad if need[5] else None, None, None, None, None, None


def _differentiate(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"sepconv::{name}", backward, setup_context=setup_context, lib=LIBRARY)


_differentiate("depthwise_conv", _setup_depthwise, _backward_depthwise)
_differentiate("depthwise_conv_grad_input", _setup_grad_input, _backward_grad_input)
_differentiate("depthwise_conv_grad_weight", _setup_grad_weight, _backward_grad_weight)
_differentiate("pointwise_conv", _setup_pointwise, _backward_pointwise)
_differentiate("separable_conv", _setup_separable, _backward_separable)


def _function(name: str, forward: Callable[..., Tensor], setup: Callable[..., None], backward: Any) -> Any:
    """The operator as an autograd function, which PyTorch calls in a third of the time."""

    def forward_and_setup(ctx: Any, *inputs: Any) -> Tensor:
        y = forward(*inputs)
        setup(ctx, inputs, y)
        return y

    members = {"forward": staticmethod(forward_and_setup), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


depthwise_function = _function("DepthwiseConv", dispatch.depthwise_forward, _setup_depthwise, _backward_depthwise)
pointwise_function = _function("PointwiseConv", dispatch.pointwise_forward, _setup_pointwise, _backward_pointwise)
separable_function = _function("SeparableConv", dispatch.separable_forward, _setup_separable, _backward_separable)
