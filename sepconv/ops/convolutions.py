"""The three convolutions in any number of dimensions: checked once, then on the shortest way that is right.

The arguments are checked (``geometry``). Then a kernel is called that was prepared for them (``call``), with gradients
as an autograd function (``autograd``); where a mode wants to see each operator, through the dispatcher (``schema``).
While somebody looks through an operation (``tracing``) the functions are made of PyTorch's own convolutions, so that
any runtime can read the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS, NAMES, is_name
from sepconv.kernels import case
from sepconv.kernels.backends import Choice, choose
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.conv import depthwise, pointwise
from sepconv.kernels.layout import is_channels_last, memory_format
from sepconv.kernels.torch import aten
from sepconv.ops import autograd, call, tracing
from sepconv.ops.autograd import Operator
from sepconv.ops.explain import HALF, Explanation, note, recording
from sepconv.ops.geometry import (
    Padding,
    Size,
    as_tuple,
    check_bias,
    check_depthwise,
    check_output,
    check_pointwise,
    check_residual,
    check_tensors,
    resolve,
)

GivenGeometry = tuple[Size, Padding, Size]
"""Stride, padding and dilation, not yet checked."""

# Bytes between the two convolutions of a layer that is trained, up to which they are kept at channels_last.
_MOST_KEPT = 4 << 20


def _check_activation(name: str, argument: str, activation: str | None) -> str:
    if activation is None:
        return ""
    if activation and not is_name(activation):
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"{name}: {argument} must be None or one of {known}, got {activation!r}")
    return activation


def _by_pytorch(op: str, *tensors: Tensor | None) -> bool:
    """Whether the operation must consist of PyTorch's own operators: any runtime can read those, and transform them."""
    reason = tracing.reason(*tensors)
    if reason and not torch.compiler.is_compiling():
        note(Explanation(op, "torch", reasons={"halide": reason}))
    return bool(reason)


def _without_kernel(op: str, reason: str, instead: str = "torch") -> bool:
    """Whether there is a reason to compose the operation of others, which is then noted."""
    if reason and not torch.compiler.is_compiling():
        note(Explanation(op, instead, reasons={"halide": reason}))
    return bool(reason)


def _half_reason(x: Tensor) -> str:
    """Why numbers of 16 bits are not for our products of matrices where there are gradients: PyTorch's use the
    processor's units for them."""
    return f"the kernel computes in float32 but got {x.dtype}" if x.dtype in HALF else ""


def depthwise_is_pytorchs(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a depthwise layer that is trained comes to PyTorch's operation, with arguments that are in order."""
    return bool(_trained_reason(x, weight, geometry))


def pointwise_is_pytorchs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """The same of a pointwise layer."""
    return bool(_trained_product_reason(x, weight, bias, None, ""))


def _trained_reason(x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """Why PyTorch's operation is the faster one where a layer is trained."""
    return "" if torch.compiler.is_compiling() else depthwise.slower_trained(case.depthwise(x, weight, None, geometry))


def _trained_product_reason(x: Tensor, weight: Tensor, *others: Any) -> str:
    return "" if torch.compiler.is_compiling() else pointwise.slower_trained(case.pointwise(x, weight, *others))


def _kept_reason(x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """Why what lies between the two convolutions of a layer that is trained is kept for the way back.

    Measured on Granite Rapids, forward and back: kept it takes less time on all contiguous images, and at channels_last
    while it stays in the cache; from there on the fused forward pass and less memory are worth the second computation.
    """
    if torch.compiler.is_compiling() or not x.is_cpu:
        return ""
    if not is_channels_last(x):
        return "on contiguous tensors it takes longer to compute what is between again than to keep it"
    between = _bytes_between(x, weight, geometry)
    if between > _MOST_KEPT:
        return ""
    return f"it takes longer to compute the {between:,} bytes between again than to keep them"


def _bytes_between(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    return len(x) * weight.shape[0] * prod(geometry.output_size(x.shape[2:], weight.shape[2:])) * x.element_size()


def _by_pytorchs_conv(geometry: Geometry, activation: str, groups: int) -> call.Run:
    return lambda x, weight, bias: aten.conv(x, weight, bias, geometry, activation, groups)


def _by_pytorchs_product(activation: str) -> call.Run:
    return lambda x, weight, bias, residual: aten.pointwise_forward(x, weight, bias, activation, residual)


def _in_turn(dims: int, given: GivenGeometry, between: str | None, activation: str | None) -> call.Run:
    """A separable convolution as two, with what is between kept where gradients need it."""
    fixed: Any = tuple([tuple(option) if isinstance(option, list) else option for option in given])

    def run(x: Tensor, dw: Tensor, pw: Tensor, dw_bias: Any, pw_bias: Any, residual: None = None) -> Tensor:
        hidden = depthwise_conv(dims, x, dw, dw_bias, fixed, between)
        return pointwise_conv(dims, hidden, pw, pw_bias, 1, activation, None)

    return run


def _note_computed_again(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    if not torch.compiler.is_compiling() and recording():
        saved = f"{_bytes_between(x, weight, geometry):,} bytes less memory until the way back"
        note(Explanation("separable_conv_between", "computed again", reasons={"kept": saved}))


def _split_for_gradient(activation: str, *tensors: Tensor | None) -> bool:
    """Whether autograd keeps the value before this activation cheaper than our backward pass would compute it again."""
    return not ACTIVATIONS[activation].from_output and _differentiated(*tensors)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _promotes(x: Tensor, residual: Tensor) -> bool:
    """Whether autocast leaves the sum of a convolution and this residual to PyTorch's rule for two dtypes."""
    if not isinstance(residual, Tensor) or not isinstance(x, Tensor) or residual.dtype == x.dtype:
        return False
    return residual.is_floating_point() and torch.is_autocast_enabled(x.device.type)


def _run(
    operation: Operator,
    known: tuple[Any, ...] | None,
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...],
    activation: str,
) -> Tensor:
    """A call whose arguments are in order, remembered as ``known`` where nobody watches; ``options`` come between the
    tensors and the last activation."""
    if known is not None and not known[0]:
        choice = choose(operation.describe(*tensors, *options, activation))
        return _kept(known, choice, choice.shortest())(*tensors)
    split = _split_for_gradient(activation, *tensors)
    options = (*options, "" if split else activation)
    if known is not None:
        choice = choose(operation.describe(*tensors, *options))
        return _kept(known, choice, _recorded(operation, choice, options, activation if split else ""))(*tensors)
    y = operation.through_dispatcher(tensors, *options)
    return ACTIVATIONS[activation].function(y) if split else y


def _kept(known: tuple[Any, ...], choice: Choice, run: call.Run) -> call.Run:
    """Remembered, unless another kernel may be chosen for the next call."""
    return call.keep(known, run) if choice.settled else run


def _recorded(operation: Operator, choice: Choice, options: tuple[Any, ...], activation: str) -> call.Run:
    """A call that autograd records; an activation that it is to see apart comes after."""
    function = operation.recorded
    if not activation:
        return lambda *tensors: function(choice, *tensors, *options)
    activate = ACTIVATIONS[activation].function
    return lambda *tensors: activate(function(choice, *tensors, *options))


def depthwise_conv(
    dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, given: GivenGeometry, activation: str | None
) -> Tensor:
    known = call.key((x, weight, bias), "depthwise", dims, *given, activation)
    run = call.find(known)
    if run is not None:
        return run(x, weight, bias)
    name = f"depthwise_conv{dims}d"
    chosen = _check_activation(name, "activation", activation)
    if tracing.symbolic(x, weight, bias):
        return aten.depthwise_symbolic(dims, x, weight, bias, *given, chosen)
    x, weight, bias = call.autocast(x, weight, bias)  # type: ignore[assignment]
    check_tensors(name, dims, x, weight=weight, bias=bias)
    if x.dim() == dims + 1:
        return depthwise_conv(dims, x[None], weight, bias, given, activation)[0]
    with tracing.paused():
        check_depthwise(name, dims, x, weight)
        check_bias(name, "bias", bias, weight.shape[0])
        kernel_size, channels = weight.shape[2:], x.shape[1]
        geometry = resolve(name, dims, kernel_size, *given)
        check_output(name, x, kernel_size, geometry)
    if _by_pytorch("depthwise_conv", x, weight, bias):
        return aten.conv(x, weight, bias, geometry, chosen, channels)
    if _differentiated(x, weight, bias) and _without_kernel("depthwise_conv", _trained_reason(x, weight, geometry)):
        by_pytorch = _by_pytorchs_conv(geometry, chosen, channels)
        return (by_pytorch if known is None else call.keep(known, by_pytorch))(x, weight, bias)
    return _run(autograd.depthwise, known, (x, weight, bias), (geometry,), chosen)


def pointwise_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    known = call.key((x, weight, bias, residual), "pointwise", dims, stride, activation)
    run = call.find(known)
    if run is not None:
        return run(x, weight, bias, residual)
    name = f"pointwise_conv{dims}d"
    chosen = _check_activation(name, "activation", activation)
    if tracing.symbolic(x, weight, bias, residual):
        return aten.pointwise_symbolic(dims, x, weight, bias, stride, chosen, residual)
    x, weight, bias = call.autocast(x, weight, bias)  # type: ignore[assignment]
    if residual is not None and _promotes(x, residual):
        return ACTIVATIONS[chosen].function(pointwise_conv(dims, x, weight, bias, stride, None, None) + residual)
    check_tensors(name, dims, x, weight=weight, bias=bias, residual=residual)
    if x.dim() == dims + 1:
        added = None if residual is None else residual[None]
        return pointwise_conv(dims, x[None], weight, bias, stride, activation, added)[0]
    steps = as_tuple(name, "stride", stride, dims, 1)
    with tracing.paused():
        check_pointwise(name, dims, x.shape[1], x, weight)
        check_bias(name, "bias", bias, weight.shape[0])
        sizes = check_output(name, x, weight.shape[2:], Geometry.of_pixels(dims)._replace(stride=steps))
        check_residual(name, residual, (x.shape[0], weight.shape[0], *sizes))
    if _by_pytorch("pointwise_conv", x, weight, bias, residual):
        return aten.pointwise_forward(x, weight, bias, chosen, residual, steps)
    if _differentiated(x, weight, bias, residual) and _without_kernel("pointwise_conv", _half_reason(x)):
        y = aten.pointwise_bf16(x, weight, bias, chosen, residual, steps)
        return y.contiguous(memory_format=memory_format(x))
    plain = max(steps) == 1 and _differentiated(x, weight, bias, residual)
    if plain and _without_kernel("pointwise_conv", _trained_product_reason(x, weight, bias, residual, chosen)):
        by_pytorch = _by_pytorchs_product(chosen)
        return (by_pytorch if known is None else call.keep(known, by_pytorch))(x, weight, bias, residual)
    for d, step in enumerate(steps):
        # A filter of one pixel that walks in steps sees every step-th pixel and no other.
        x = x if step == 1 else x[(slice(None),) * (2 + d) + (slice(None, None, step),)]
    if any(step > 1 for step in steps):
        known = None
    return _run(autograd.pointwise, known, (x, weight, bias, residual), (), chosen)


def separable_conv(
    dims: int,
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    given: GivenGeometry,
    depthwise_activation: str | None,
    activation: str | None,
) -> Tensor:
    """``weights`` and ``biases``: of the depthwise convolution, then of the pointwise one."""
    tensors = (x, *weights, *biases, None)
    known = call.key(tensors, "separable", dims, *given, depthwise_activation, activation)
    run = call.find(known)
    if run is not None:
        return run(*tensors)
    name = f"separable_conv{dims}d"
    between = _check_activation(name, "depthwise_activation", depthwise_activation)
    chosen = _check_activation(name, "activation", activation)
    (dw, pw), (dw_bias, pw_bias) = weights, biases
    if tracing.symbolic(*tensors):
        hidden = aten.depthwise_symbolic(dims, x, dw, dw_bias, *given, between)
        return aten.pointwise_symbolic(dims, hidden, pw, pw_bias, 1, chosen)
    x, dw, pw, dw_bias, pw_bias = call.autocast(x, dw, pw, dw_bias, pw_bias)  # type: ignore[assignment]
    others = {"depthwise_weight": dw, "pointwise_weight": pw, "depthwise_bias": dw_bias, "pointwise_bias": pw_bias}
    check_tensors(name, dims, x, **others)
    if x.dim() == dims + 1:
        arguments = ((dw, pw), (dw_bias, pw_bias), given, depthwise_activation, activation)
        return separable_conv(dims, x[None], *arguments)[0]
    with tracing.paused():
        check_depthwise(name, dims, x, dw, "depthwise_weight")
        check_pointwise(name, dims, dw.shape[0], x, pw, "pointwise_weight")
        check_bias(name, "depthwise_bias", dw_bias, dw.shape[0])
        check_bias(name, "pointwise_bias", pw_bias, pw.shape[0])
        channels = x.shape[1]
        geometry = resolve(name, dims, dw.shape[2:], *given)
        check_output(name, x, dw.shape[2:], geometry)
    if _by_pytorch("separable_conv", *tensors):
        hidden = aten.conv(x, dw, dw_bias, geometry, between, channels)
        return aten.pointwise_forward(hidden, pw, pw_bias, chosen)
    trained = _differentiated(*tensors)
    reason = _half_reason(x)
    if trained and not reason:
        reason = _trained_reason(x, dw, geometry) or _kept_reason(x, dw, geometry)
    if _without_kernel("separable_conv", reason, "depthwise, then pointwise"):
        in_turn = _in_turn(dims, given, depthwise_activation, activation)
        return (in_turn if known is None else call.keep(known, in_turn))(x, dw, pw, dw_bias, pw_bias)
    if trained:
        _note_computed_again(x, dw, geometry)
    return _run(autograd.separable, known, (x, dw, pw, dw_bias, pw_bias, None), (geometry, between), chosen)
