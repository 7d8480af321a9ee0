"""From the arguments of a public function to a kernel: checked once, then on the shortest way that is right.

The arguments are checked (``shapes``), then the operator is called (``operators``), which calls a kernel
(``dispatch``); a call like an earlier one goes straight to the kernel (``direct``). While somebody looks through an
operation (``tracing``) the functions are made of PyTorch's own convolutions, so that any runtime can read the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS, NAMES
from sepconv.kernels.torch import aten
from sepconv.ops import direct, tracing
from sepconv.ops.autograd import depthwise_function, pointwise_function, separable_function
from sepconv.ops.dispatch import as_output, depthwise_choice, pointwise_choice, separable_choice
from sepconv.ops.explain import HALF, Explanation, note
from sepconv.ops.geometry import (
    Geometry,
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
from sepconv.ops.schema import DEPTHWISE, POINTWISE, SEPARABLE


def _check_activation(name: str, argument: str, activation: str | None) -> str:
    if activation is None:
        return ""
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"{name}: {argument} must be None or one of {known}, got {activation!r}")
    return activation


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the arguments of PyTorch's convolutions."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _is_cast(t, device) else t for t in tensors)


def _is_cast(t: Tensor, device: str) -> bool:
    return t.is_floating_point() and t.dtype is not torch.float64 and t.device.type == device


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
    """Why numbers of 16 bits are not for our products of matrices: PyTorch's use the processor's units for them."""
    return f"the kernel computes in float32 but got {x.dtype}" if x.dtype in HALF else ""


def _split_for_gradient(activation: str, *tensors: Tensor | None) -> bool:
    """Whether autograd keeps the value before this activation cheaper than our backward pass would compute it again."""
    if ACTIVATIONS[activation].from_output or not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def _promotes(x: Tensor, residual: Tensor) -> bool:
    """Whether autocast leaves the sum of a convolution and this residual to PyTorch's rule for two dtypes."""
    if not isinstance(residual, Tensor) or not isinstance(x, Tensor) or residual.dtype == x.dtype:
        return False
    return residual.is_floating_point() and torch.is_autocast_enabled(x.device.type)


def _differentiable(function: Callable[..., Tensor], options: tuple[Any, ...], activation: str) -> direct.Run:
    """A call that autograd records; an activation that it is to see apart comes after."""
    if not activation:
        return lambda *tensors: function(*tensors, *options)
    return lambda *tensors: ACTIVATIONS[activation].function(function(*tensors, *options))


def depthwise_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    activation: str | None,
) -> Tensor:
    call = direct.key((x, weight, bias), "depthwise", dims, stride, padding, dilation, activation)
    known = direct.find(call)
    if known is not None:
        return known(x, weight, bias)
    name = f"depthwise_conv{dims}d"
    chosen = _check_activation(name, "activation", activation)
    if tracing.symbolic(x, weight, bias):
        return aten.depthwise_symbolic(dims, x, weight, bias, stride, padding, dilation, chosen)
    x, weight, bias = _autocast(x, weight, bias)  # type: ignore[assignment]
    check_tensors(name, dims, x, weight=weight, bias=bias)
    if x.dim() == dims + 1:
        unbatched = depthwise_conv(dims, x[None], weight, bias, stride, padding, dilation, activation)
        return unbatched[0]
    with tracing.paused():
        check_depthwise(name, dims, x, weight)
        check_bias(name, "bias", bias, weight.shape[0])
        kernel_size, channels = weight.shape[2:], x.shape[1]
        g = resolve(name, dims, kernel_size, stride, padding, dilation)
        check_output(name, x, kernel_size, g)
    if _by_pytorch("depthwise_conv", x, weight, bias):
        return aten.conv(x, weight, bias, g.stride, g.padding, g.dilation, chosen, channels)
    tensors, walk = (x, weight, bias), (g.stride, g.flat_padding, g.dilation)
    if call is not None and not call[0]:
        return direct.keep(call, depthwise_choice(*tensors, *walk, chosen).unrecorded())(*tensors)
    split = _split_for_gradient(chosen, *tensors)
    options = (*walk, "" if split else chosen)
    if call is not None:
        return direct.keep(call, _differentiable(depthwise_function, options, chosen if split else ""))(*tensors)
    y: Tensor = DEPTHWISE(*tensors, *options)
    return ACTIVATIONS[chosen].function(y) if split else y


def pointwise_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    call = direct.key((x, weight, bias, residual), "pointwise", dims, stride, activation)
    known = direct.find(call)
    if known is not None:
        return known(x, weight, bias, residual)
    name = f"pointwise_conv{dims}d"
    chosen = _check_activation(name, "activation", activation)
    if tracing.symbolic(x, weight, bias, residual):
        return aten.pointwise_symbolic(dims, x, weight, bias, stride, chosen, residual)
    x, weight, bias = _autocast(x, weight, bias)  # type: ignore[assignment]
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
        sizes = check_output(name, x, weight.shape[2:], Geometry(steps, ((0, 0),) * dims, (1,) * dims))
        check_residual(name, residual, (x.shape[0], weight.shape[0], *sizes))
    if _by_pytorch("pointwise_conv", x, weight, bias, residual):
        return aten.pointwise_forward(x, weight, bias, chosen, residual, steps)
    if _without_kernel("pointwise_conv", _half_reason(x)):
        return as_output(aten.pointwise_bf16(x, weight, bias, chosen, residual, steps), x)
    for d, step in enumerate(steps):
        # A filter of one pixel that walks in steps sees every step-th pixel and no other.
        x = x if step == 1 else x[(slice(None),) * (2 + d) + (slice(None, None, step),)]
    tensors = (x, weight, bias, residual)
    if any(step > 1 for step in steps):
        call = None
    if call is not None and not call[0]:
        return direct.keep(call, pointwise_choice(*tensors, chosen).unrecorded())(*tensors)
    split = _split_for_gradient(chosen, *tensors)
    options = ("" if split else chosen,)
    if call is not None:
        return direct.keep(call, _differentiable(pointwise_function, options, chosen if split else ""))(*tensors)
    y: Tensor = POINTWISE(*tensors, *options)
    return ACTIVATIONS[chosen].function(y) if split else y


def separable_conv(
    dims: int,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    depthwise_activation: str | None,
    activation: str | None,
) -> Tensor:
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, None)
    call = direct.key(tensors, "separable", dims, stride, padding, dilation, depthwise_activation, activation)
    known = direct.find(call)
    if known is not None:
        return known(*tensors)
    name = f"separable_conv{dims}d"
    between = _check_activation(name, "depthwise_activation", depthwise_activation)
    chosen = _check_activation(name, "activation", activation)
    dw, pw, dw_bias, pw_bias = depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    if tracing.symbolic(*tensors):
        hidden = aten.depthwise_symbolic(dims, x, dw, dw_bias, stride, padding, dilation, between)
        return aten.pointwise_symbolic(dims, hidden, pw, pw_bias, 1, chosen)
    x, dw, pw, dw_bias, pw_bias = _autocast(x, dw, pw, dw_bias, pw_bias)  # type: ignore[assignment]
    check_tensors(
        name,
        dims,
        x,
        depthwise_weight=dw,
        pointwise_weight=pw,
        depthwise_bias=dw_bias,
        pointwise_bias=pw_bias,
    )
    if x.dim() == dims + 1:
        arguments = (stride, padding, dilation, depthwise_activation, activation)
        return separable_conv(dims, x[None], dw, pw, dw_bias, pw_bias, *arguments)[0]
    with tracing.paused():
        check_depthwise(name, dims, x, dw, "depthwise_weight")
        check_pointwise(name, dims, dw.shape[0], x, pw, "pointwise_weight")
        check_bias(name, "depthwise_bias", dw_bias, dw.shape[0])
        check_bias(name, "pointwise_bias", pw_bias, pw.shape[0])
        channels = x.shape[1]
        g = resolve(name, dims, dw.shape[2:], stride, padding, dilation)
        check_output(name, x, dw.shape[2:], g)
    if _by_pytorch("separable_conv", *tensors):
        hidden = aten.conv(x, dw, dw_bias, g.stride, g.padding, g.dilation, between, channels)
        return aten.pointwise_forward(hidden, pw, pw_bias, chosen)
    if _without_kernel("separable_conv", _half_reason(x), "depthwise, then pointwise"):
        hidden = depthwise_conv(dims, x, dw, dw_bias, stride, padding, dilation, depthwise_activation)
        return pointwise_conv(dims, hidden, pw, pw_bias, 1, activation, None)
    walk = (g.stride, g.flat_padding, g.dilation)
    if call is not None and not call[0]:
        return direct.keep(call, separable_choice(*tensors, *walk, between, chosen).unrecorded())(*tensors)
    split = _split_for_gradient(chosen, *tensors)
    options = (*walk, between, "" if split else chosen)
    if call is not None:
        return direct.keep(call, _differentiable(separable_function, options, chosen if split else ""))(*tensors)
    y: Tensor = SEPARABLE(x, dw, pw, dw_bias, pw_bias, None, *options)
    return ACTIVATIONS[chosen].function(y) if split else y
