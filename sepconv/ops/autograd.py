"""The derivatives of the operators: each gradient is an operator of its own, testable alone and differentiable again.

Where a transformation comes after the forward pass (``tracing``), the backward pass is made of PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels import case
from sepconv.kernels.backends import Choice
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.training import depthwise_calls
from sepconv.kernels.layout import is_channels_last
from sepconv.kernels.prologue import StageGradients
from sepconv.kernels.stages import gradients_choice
from sepconv.kernels.torch import aten
from sepconv.ops import tracing
from sepconv.ops.call import compute, unnoticed, untraced
from sepconv.ops.schema import (
    DEPTHWISE,
    GRAD_INPUT,
    GRAD_WEIGHT,
    LIBRARY,
    POINTWISE,
    SEPARABLE,
    describe_separable,
    flat,
    geometry_of,
)


def _before_activation(grad: Tensor, activation: str, y: Tensor, compute_z: Callable[[], Tensor]) -> Tensor:
    """The gradient in front of an activation, whose input is computed again where the output does not tell."""
    known = ACTIVATIONS[activation]
    return known.backward(grad, y if known.from_output else compute_z())


def laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the weight's strides, also in dimensions of size 1, which DistributedDataParallel compares."""
    if grad.stride() == weight.stride() or not (weight.is_contiguous() and grad.is_contiguous()):
        return grad
    return grad.as_strided(weight.shape, weight.stride())


def _sum_to_bias(grad: Tensor) -> Tensor:
    if not (grad.is_cpu and is_channels_last(grad)):
        return grad.sum([0, *range(2, grad.dim())])
    # A product with ones takes half the time of PyTorch's sum over the first dimension.
    pixels = _pixels(grad)
    return (pixels.new_ones(1, len(pixels)) @ pixels)[0]


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str) -> Tensor:
    """The operator's result, here and below without the operator where nobody would notice."""
    if unnoticed(x, weight):
        return compute(case.depthwise, (x, weight, bias), geometry, activation)
    y: Tensor = DEPTHWISE(x, weight, bias, *flat(geometry), activation)
    return y


def depthwise_grad_input(grad_output: Tensor, weight: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    if unnoticed(grad_output, weight):
        return compute(case.depthwise_grad_input, (grad_output, weight), tuple(size), geometry)
    grad: Tensor = GRAD_INPUT(grad_output, weight, size, *flat(geometry))
    return grad


def depthwise_grad_weight(grad_output: Tensor, x: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    if unnoticed(grad_output, x):
        return compute(case.depthwise_grad_weight, (grad_output, x), tuple(size), geometry)
    grad: Tensor = GRAD_WEIGHT(grad_output, x, size, *flat(geometry))
    return grad


Gradients = tuple[Tensor | None, ...]


def _in_one_walk(
    need: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> StageGradients | None:
    """Both gradients at once, of images that this is faster for: PyTorch's too is called once instead of twice."""
    if not (need[0] and need[1] and x.dim() == 4 and is_channels_last(x) and untraced(grad, x, weight)):
        return None
    choice = gradients_choice("depthwise", (grad, x, weight), None, geometry, (True, True, need[2]))
    return choice(grad, None, x, None, weight) if not depthwise_calls.supports(choice.case) else None


def _depthwise_grads(need: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Gradients:
    found = _in_one_walk(need, grad, x, weight, geometry)
    if found is not None:
        assert found.weight is not None
        of_bias = None if found.bias is None else found.bias.to(grad.dtype)
        return found.x, laid_out_as(weight, found.weight), of_bias
    return (
        depthwise_grad_input(grad, weight, x.shape, geometry) if need[0] else None,
        laid_out_as(weight, depthwise_grad_weight(grad, x, weight.shape, geometry)) if need[1] else None,
        _sum_to_bias(grad) if need[2] else None,
    )


def _pixels(x: Tensor) -> Tensor:
    """(N, C, *) -> (pixels, C), without a copy where x is channels_last."""
    return x.movedim(1, -1).flatten(0, -2)


def _pointwise_grads(need: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    """By PyTorch's matrix products, which need no packed copy of weights that change in every step.

    On other devices than CPUs as PyTorch's convolutions do it: there its settings for products are others.
    """
    if not grad.is_cpu:
        pixels = Geometry.of_pixels(grad.dim() - 2)
        of_x, of_weight = aten.convolution_gradients(grad, x, weight, pixels, (need[0], need[1]))
        of_weight = None if of_weight is None else laid_out_as(weight, of_weight)
        return of_x, of_weight, _sum_to_bias(grad) if need[2] else None
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
        grad_weight = laid_out_as(weight, grad_weight)
    return grad_x, grad_weight, _sum_to_bias(grad) if need[2] else None


def _composed_grads(
    compose: Callable[..., Tensor], grad: Tensor, tensors: Sequence[Tensor | None], need: Sequence[bool]
) -> Gradients:
    """The gradients of ``compose(*tensors)``, by PyTorch's formulas for its own operators: all transformations know
    those."""
    with torch.enable_grad():
        # Under other names: one tensor may have been made of another, a way back that is not ours to go.
        named = [None if t is None else t.view_as(t) for t in tensors]
        y = compose(*named)
    wanted = [t for t, needed in zip(named, need, strict=True) if needed and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()) if wanted else ())
    return tuple([next(grads) if needed and t is not None else None for t, needed in zip(named, need, strict=True)])


def _setup_depthwise(ctx: Any, inputs: Sequence[Any], y: Tensor) -> None:
    x, weight, bias, ctx.geometry, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, y if ctx.activation else None)


def _backward_depthwise(ctx: Any, need: Sequence[bool], grad: Tensor) -> Gradients:
    x, weight, bias, y = ctx.saved_tensors
    geometry = ctx.geometry
    if tracing.transformed(grad, x, weight):

        def compose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return aten.depthwise_forward(x, weight, bias, geometry)

        grad = _before_activation(grad, ctx.activation, y, lambda: compose(x, weight, bias))
        return _composed_grads(compose, grad, (x, weight, bias), need)
    grad = _before_activation(grad, ctx.activation, y, lambda: _depthwise(x, weight, bias, geometry, ""))
    return _depthwise_grads(need, grad, x, weight, geometry)


def _setup_gradient(ctx: Any, inputs: Sequence[Any], grad: Tensor) -> None:
    """Of the gradient of the input or of the filters."""
    first, second, ctx.size, ctx.geometry = inputs
    ctx.save_for_backward(first, second)


def _backward_grad_input(ctx: Any, need: Sequence[bool], grad: Tensor) -> Gradients:
    grad_output, weight = ctx.saved_tensors
    if tracing.transformed(grad, grad_output, weight):
        compose = aten.prepare_grad_input(ctx.size, ctx.geometry)
        return _composed_grads(compose, grad, (grad_output, weight), need)
    of_output = _depthwise(grad, weight, None, ctx.geometry, "") if need[0] else None
    of_weight = depthwise_grad_weight(grad_output, grad, weight.shape, ctx.geometry) if need[1] else None
    return of_output, of_weight


def _backward_grad_weight(ctx: Any, need: Sequence[bool], grad: Tensor) -> Gradients:
    grad_output, x = ctx.saved_tensors
    if tracing.transformed(grad, grad_output, x):
        compose = aten.prepare_grad_weight(ctx.size, x.shape[1], ctx.geometry)
        return _composed_grads(compose, grad, (grad_output, x), need)
    of_output = _depthwise(x, grad, None, ctx.geometry, "") if need[0] else None
    of_x = depthwise_grad_input(grad_output, grad, x.shape, ctx.geometry) if need[1] else None
    return of_output, of_x


def _setup_pointwise(ctx: Any, inputs: Sequence[Any], y: Tensor) -> None:
    x, weight, bias, residual, ctx.activation = inputs
    from_output = ACTIVATIONS[ctx.activation].from_output
    ctx.save_for_backward(x, weight, bias, None if from_output else residual, y if ctx.activation else None)


def _backward_pointwise(ctx: Any, need: Sequence[bool], grad: Tensor) -> Gradients:
    x, weight, bias, residual, y = ctx.saved_tensors
    if tracing.transformed(grad, x, weight):
        conv = aten.pointwise_forward
        grad = _before_activation(grad, ctx.activation, y, lambda: conv(x, weight, bias, "", residual))
        return *_composed_grads(conv, grad, (x, weight, bias), need[:3]), grad if need[3] else None
    grad = _before_activation(grad, ctx.activation, y, lambda: POINTWISE(x, weight, bias, residual, ""))
    return *_pointwise_grads(need, grad, x, weight), grad if need[3] else None


def _setup_separable(ctx: Any, inputs: Sequence[Any], y: Tensor) -> None:
    *tensors, residual, ctx.geometry, between, activation = inputs
    ctx.activations = between, activation
    from_output = ACTIVATIONS[activation].from_output
    ctx.save_for_backward(*tensors, None if from_output else residual, y if activation else None)


def _backward_separable(ctx: Any, need: Sequence[bool], grad: Tensor) -> Gradients:
    """The depthwise result is computed again instead of kept: it would be the largest tensor of the layer."""
    x, dw, pw, dw_bias, pw_bias, residual, y = ctx.saved_tensors
    dw_activation, activation = ctx.activations
    if tracing.transformed(grad, x, dw, pw):
        return _backward_composed_separable(ctx, need, grad)
    between = ACTIVATIONS[dw_activation]
    hidden = z = _depthwise(x, dw, dw_bias, ctx.geometry, dw_activation if between.from_output else "")
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
    return grad_x, grad_dw, grad_pw, grad_dw_bias, grad_pw_bias, grad if need[5] else None


def _backward_composed_separable(ctx: Any, need: Sequence[bool], grad: Tensor) -> Gradients:
    x, dw, pw, dw_bias, pw_bias, residual, y = ctx.saved_tensors
    dw_activation, activation = ctx.activations

    def compose(x: Tensor, dw: Tensor, pw: Tensor, dw_bias: Any, pw_bias: Any, residual: Any = None) -> Tensor:
        hidden = aten.depthwise_forward(x, dw, dw_bias, ctx.geometry, dw_activation)
        return aten.pointwise_forward(hidden, pw, pw_bias, "", residual)

    grad = _before_activation(grad, activation, y, lambda: compose(x, dw, pw, dw_bias, pw_bias, residual))
    return *_composed_grads(compose, grad, (x, dw, pw, dw_bias, pw_bias), need[:5]), grad if need[5] else None


@dataclass(frozen=True)
class Operator:
    """An operator with its derivatives, in the three forms in which it is called.

    Attributes:
        describe: its case; takes tensors, geometry (if it has one) and activations.
        operator: what PyTorch's dispatcher knows; takes the same, the geometry flat.
        recorded: the autograd function, which PyTorch calls in a third of the time; takes a choice, then the same.
        has_geometry: whether a geometry comes after the tensors.
    """

    describe: Callable[..., Case]
    operator: Any
    recorded: Callable[..., Tensor]
    has_geometry: bool

    def through_dispatcher(self, tensors: Sequence[Tensor | None], *options: Any) -> Tensor:
        if self.has_geometry:
            options = (*flat(options[0]), *options[1:])
        y: Tensor = self.operator(*tensors, *options)
        return y


Setup = Callable[[Any, Sequence[Any], Tensor], None]
Backward = Callable[[Any, Sequence[bool], Tensor], Gradients]


def _tensors(operator: Any) -> int:
    """How many arguments are tensors; they come first."""
    return sum("Tensor" in str(argument.type) for argument in operator._schema.arguments)


def _differentiate(operator: Any, setup: Setup, backward: Backward) -> None:
    """Register the derivatives of an operator, whose schema holds the geometry as three lists."""
    names, tensors = [argument.name for argument in operator._schema.arguments], _tensors(operator)
    at = names.index("stride") if "stride" in names else None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if at is not None:
            inputs = (*inputs[:at], geometry_of(*inputs[at : at + 3]), *inputs[at + 3 :])
        setup(ctx, inputs, output)

    def gradients(ctx: Any, grad: Tensor) -> Gradients:
        return *backward(ctx, ctx.needs_input_grad[:tensors], grad), *[None] * (len(names) - tensors)

    name = f"sepconv::{operator._schema.name.split('::')[-1]}"
    torch.library.register_autograd(name, gradients, setup_context=setup_context, lib=LIBRARY)


def _operation(describe: Callable[..., Case], operator: Any, setup: Setup, backward: Backward) -> Operator:
    _differentiate(operator, setup, backward)
    tensors = _tensors(operator)

    def forward(ctx: Any, choice: Choice, *inputs: Any) -> Tensor:
        y = choice(*inputs[:tensors])
        setup(ctx, inputs, y)
        ctx.options = [None] * (len(inputs) - tensors)
        return y

    def gradients(ctx: Any, grad: Tensor) -> Gradients:
        return None, *backward(ctx, ctx.needs_input_grad[1 : 1 + tensors], grad), *ctx.options

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    recorded = type(operator.__name__, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]
    return Operator(describe, operator, recorded, any(a.name == "stride" for a in operator._schema.arguments))


_differentiate(GRAD_INPUT, _setup_gradient, _backward_grad_input)
_differentiate(GRAD_WEIGHT, _setup_gradient, _backward_grad_weight)
depthwise = _operation(case.depthwise, DEPTHWISE, _setup_depthwise, _backward_depthwise)
pointwise = _operation(case.pointwise, POINTWISE, _setup_pointwise, _backward_pointwise)
separable = _operation(describe_separable, SEPARABLE, _setup_separable, _backward_separable)
