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

from sepconv.kernels import aten


@dataclass(frozen=True)
class Explanation:
    """One kernel choice.

    ``kernel`` is "halide" or "torch"; ``schedule`` holds the parameters of the pipeline that ran; ``reasons`` maps each
    kernel that was passed over to the sentence that says why.
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


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` lies in memory pixel by pixel, views included; where both readings are possible it does not."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[d] == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * max(x.shape[d], 1)
    return True


def new_output(x: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    """An empty output of an operation on ``x``: in the same layout."""
    shape = [x.shape[0], channels, *sizes]
    if not is_channels_last(x):
        return x.new_empty(shape)
    memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _as_output(y: Tensor, x: Tensor) -> Tensor:
    """Give PyTorch's result the layout that :func:`new_output` promises; no copy where it has it already."""
    if not is_channels_last(x):
        return y.contiguous()
    return y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def _note(op: str, reason: str) -> None:
    collected = _RECORD.get()
    if collected is not None:
        collected.append(Explanation(op, "torch", {}, {"halide": reason}))


_NOT_YET = "this version runs every operation through PyTorch's kernels"


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    _note("depthwise_conv", _NOT_YET)
    y = aten.depthwise_forward(x, weight, bias, stride, _pairs(padding), dilation, activation)
    return _as_output(y, x)


def depthwise_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _note("depthwise_conv_grad_input", _NOT_YET)
    grad = aten.depthwise_grad_input(grad_output, weight, input_size, stride, _pairs(padding), dilation)
    return _as_output(grad, grad_output)


def depthwise_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _note("depthwise_conv_grad_weight", _NOT_YET)
    grad = aten.depthwise_grad_weight(grad_output, x, weight_size, stride, _pairs(padding), dilation)
    return grad.contiguous()


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    _note("pointwise_conv", _NOT_YET)
    return _as_output(aten.pointwise_forward(x, weight, bias, activation, residual), x)


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
    _note("separable_conv", _NOT_YET)
    y = aten.separable_forward(
        x,
        depthwise_weight,
        depthwise_bias,
        depthwise_activation,
        pointwise_weight,
        pointwise_bias,
        activation,
        stride,
        _pairs(padding),
        dilation,
        residual,
    )
    return _as_output(y, x)


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
