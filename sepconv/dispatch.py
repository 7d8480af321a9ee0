"""Which kernel computes an operation, and why a faster one does not.

Each operation has a fast kernel (Halide, on CPUs) and PyTorch's own, which runs everywhere. The choice depends on
shapes, strides, dtype and device, never on values. :func:`record` collects every choice made while it is active, so
that ``sepconv.explain``, the tests and the benchmarks see what really ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels import aten, depthwise, layout, pointwise, runtime, separable


@dataclass(frozen=True)
class Explanation:
    """One kernel choice.

    ``kernel`` is "halide", "torch", or "depthwise, then pointwise" for a separable convolution that was not fused and
    whose two parts follow; ``schedule`` holds the parameters of the pipeline that ran; ``reasons`` maps each kernel
    that was passed over to the sentence that says why.
    """

    op: str
    kernel: str
    schedule: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.kernel}"]
        lines += [f"  {key} = {value}" for key, value in self.schedule.items()]
        lines += [f"  not {kernel}: {reason}" for kernel, reason in self.reasons.items()]
        return "\n".join(lines)


_RECORD: ContextVar[list[Explanation] | None] = ContextVar("sepconv_record", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Explanation]]:
    """Collect the kernel choices made in this context."""
    collected: list[Explanation] = []
    token = _RECORD.set(collected)
    try:
        yield collected
    finally:
        _RECORD.reset(token)


def _as_output(y: Tensor, x: Tensor) -> Tensor:
    """Give PyTorch's result the layout that ``layout.new_output`` promises; no copy where it has it already."""
    if not layout.is_channels_last(x):
        return y.contiguous()
    return y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def _note(op: str, kernel: str, describe: Callable[[], dict[str, Any]], reasons: dict[str, str]) -> None:
    collected = _RECORD.get()
    if collected is not None:
        collected.append(Explanation(op, kernel, describe(), reasons))


def _compute(
    op: str,
    reason: str,
    fast: Callable[[], Tensor],
    describe: Callable[[], dict[str, Any]],
    slow: Callable[[], Tensor],
    slow_name: str = "torch",
) -> Tensor:
    """Run the fast kernel unless there is a reason not to; a pipeline that cannot be built is such a reason."""
    if not reason:
        try:
            y = fast()
        except runtime.BuildError as error:
            reason = str(error)
        else:
            _note(op, "halide", describe, {})
            return y
    _note(op, slow_name, dict, {"halide": reason})
    return slow()


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    case = ("forward", x, weight, stride, _pairs(padding), dilation, activation)
    arguments = (x, weight, bias, *case[3:])
    return _compute(
        "depthwise_conv",
        depthwise.supports(*case) or depthwise.slower(*case),
        lambda: depthwise.forward(*arguments),
        lambda: depthwise.describe(*case),
        lambda: _as_output(aten.depthwise_forward(*arguments), x),
    )


def depthwise_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    case = ("grad_input", grad_output, weight, stride, _pairs(padding), dilation)
    arguments = (grad_output, weight, input_size, *case[3:])
    return _compute(
        "depthwise_conv_grad_input",
        depthwise.supports(*case) or depthwise.slower(*case, size=input_size),
        lambda: depthwise.grad_input(*arguments),
        lambda: depthwise.describe(*case, size=input_size),
        lambda: _as_output(aten.depthwise_grad_input(*arguments), grad_output),
    )


def depthwise_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    case = ("grad_weight", grad_output, x, stride, _pairs(padding), dilation)
    arguments = (grad_output, x, weight_size, *case[3:])
    return _compute(
        "depthwise_conv_grad_weight",
        depthwise.supports(*case) or depthwise.slower(*case, size=weight_size),
        lambda: depthwise.grad_weight(*arguments),
        lambda: depthwise.describe(*case, size=weight_size),
        lambda: aten.depthwise_grad_weight(*arguments).contiguous(),
    )


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    arguments = (x, weight, bias, activation, residual)
    return _compute(
        "pointwise_conv",
        pointwise.supports(*arguments) or pointwise.slower(*arguments),
        lambda: pointwise.forward(*arguments),
        lambda: pointwise.describe(*arguments),
        lambda: _as_output(aten.pointwise_forward(*arguments), x),
    )


def separable_forward(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: str,
    activation: str,
) -> Tensor:
    """One pipeline where there is one, else the two operations one after the other, each with its own choice."""
    first = (x, depthwise_weight, depthwise_bias, depthwise_activation)
    arguments = (*first, pointwise_weight, pointwise_bias, activation, stride, _pairs(padding), dilation, residual)

    def separately() -> Tensor:
        geometry = (stride, padding, dilation)
        hidden = depthwise_forward(x, depthwise_weight, depthwise_bias, *geometry, depthwise_activation)
        return pointwise_forward(hidden, pointwise_weight, pointwise_bias, residual, activation)

    return _compute(
        "separable_conv",
        separable.supports(*arguments) or separable.slower(*arguments),
        lambda: separable.forward(*arguments),
        lambda: separable.describe(*arguments),
        separately,
        "depthwise, then pointwise",
    )


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Call ``op`` and say which kernels computed it and why faster ones did not.

    Args:
        op: a function of this library, or any module or function that uses them, such as a whole model.
        args, kwargs: its arguments. Gradients are explained too where ``op`` runs a backward pass itself.

    Example:
        >>> import sepconv
        >>> layer = sepconv.DepthwiseConv2d(2, 3, dtype=torch.float64)
        >>> print(explain(layer, torch.ones(1, 2, 5, 5, dtype=torch.float64))[0].kernel)
        torch
    """
    if not callable(op):
        raise TypeError(f"explain: op must be a function or a module, got {type(op).__name__}")
    with record() as choices:
        op(*args, **kwargs)
    return choices
