"""Which kernel computes an operation, and why a faster one does not.

Each operation has a fast kernel (Halide, on CPUs) and PyTorch's own, which runs everywhere. The choice depends on
shapes, strides, dtype and device, never on values. :func:`record` collects every choice made while it is active, so
that ``sepconv.explain``, the tests and the benchmarks see what really ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
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


def recording() -> bool:
    """Whether choices are being collected."""
    return _RECORD.get() is not None


def note(choice: Explanation) -> None:
    """Add to the choices being collected."""
    collected = _RECORD.get()
    if collected is not None:
        collected.append(choice)


def as_output(y: Tensor, x: Tensor) -> Tensor:
    """Give PyTorch's result the layout that ``layout.new_output`` promises; no copy where it has it already."""
    return y.contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    if not layout.is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(padding[::2], padding[1::2], strict=True))


MAX_CHOICES = 4096


class Choice:
    """The kernel for one operation on tensors of fixed sizes and strides; call it with those tensors."""

    __slots__ = ("_describe", "_fast", "_slow", "op", "reason", "slow_name")

    def __init__(
        self,
        op: str,
        reason: str,
        fast: Callable[[], Callable[..., Tensor]],
        describe: Callable[[], dict[str, Any]],
        slow: Callable[..., Tensor],
        slow_name: str = "torch",
    ) -> None:
        """``fast()`` makes the fast kernel ready; a pipeline that cannot be built is a reason against it."""
        self.op, self.reason, self._describe, self._slow, self.slow_name = op, reason, describe, slow, slow_name
        self._fast: Callable[..., Tensor] | None = None
        if not reason:
            try:
                self._fast = fast()
            except runtime.BuildError as error:
                self.reason = str(error)

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        if self._fast is not None:
            try:
                y = self._fast(*tensors)
            except runtime.BuildError as error:
                self._fast, self.reason = None, str(error)
            else:
                if recording():
                    note(Explanation(self.op, "halide", self._describe()))
                return y
        if recording():
            note(Explanation(self.op, self.slow_name, reasons={"halide": self.reason}))
        return self._slow(*tensors)

    def unrecorded(self) -> Callable[..., Tensor]:
        """The shortest way to the result, for calls that nobody records."""
        return self if self._fast is not None else self._slow


_choices: dict[Hashable, Choice] = {}


def signature(tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """All that a choice depends on in float32 tensors on the CPU; None where one of them is another kind of tensor."""
    found: list[Any] = []
    for t in tensors:
        if t is None:
            found.append(None)
        elif t.is_cpu and t.dtype is torch.float32 and t.layout is torch.strided and not t.is_neg():
            found.append((t.shape, t.stride()))
        else:
            return None
    return tuple(found)


def _choose(consider: Callable[..., Choice], tensors: Sequence[Tensor | None], *others: Sequence[int] | str) -> Choice:
    """``consider(*tensors, *others)``, remembered: to weigh the kernels takes longer than a small one runs."""
    seen = signature(tensors)
    if seen is None:
        return consider(*tensors, *others)
    key = (consider, seen, torch.get_num_threads(), *[o if isinstance(o, str) else tuple(o) for o in others])
    choice = _choices.get(key)
    if choice is None:
        if len(_choices) >= MAX_CHOICES:
            _choices.clear()
        choice = _choices[key] = consider(*tensors, *others)
    return choice


def _outline(tensor: Tensor | None) -> Callable[[], Any]:
    """Makes a tensor of this size and strides without memory: a choice that is kept must not keep tensors."""
    if tensor is None:
        return lambda: None
    shape, stride = tensor.shape, tensor.stride()
    return lambda: torch.empty_strided(shape, stride, device="meta")


def _prepare_pytorch(x: Tensor, geometry: tuple[Any, Any, Any], activation: str) -> Callable[..., Tensor]:
    """PyTorch's depthwise convolution for tensors like ``x``, with all that their sizes decide decided."""
    stride, padding, dilation = geometry
    if activation or any(low != high for low, high in padding):
        return lambda x, w, b: as_output(aten.depthwise_forward(x, w, b, *geometry, activation), x)
    conv: Callable[..., Tensor] = aten.CONV[len(stride)]
    amounts, groups = [low for low, _ in padding], x.shape[1]
    form = _memory_format(x)
    in_form: bool | None = None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal in_form
        y = conv(x, weight, bias, stride, amounts, dilation, groups)
        if in_form is None:  # for these sizes and strides PyTorch's choice of a layout is always the same
            in_form = y.is_contiguous(memory_format=form)
        return y if in_form else y.contiguous(memory_format=form)

    return run


def _consider_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Choice:
    geometry = (tuple(stride), _pairs(padding), tuple(dilation))
    x_like, w_like = _outline(x), _outline(weight)
    case = ("forward", x, weight, *geometry, activation)
    return Choice(
        "depthwise_conv",
        depthwise.supports(*case) or depthwise.slower(*case),
        lambda: depthwise.prepare_forward(x, weight, bias, *geometry, activation),
        lambda: depthwise.describe("forward", x_like(), w_like(), *geometry, activation),
        _prepare_pytorch(x, geometry, activation),
    )


def _consider_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Choice:
    size, geometry = tuple(input_size), (tuple(stride), _pairs(padding), tuple(dilation))
    g_like, w_like = _outline(grad_output), _outline(weight)
    by_pytorch, form = aten.prepare_grad_input(size, *geometry), _memory_format(grad_output)
    case = ("grad_input", grad_output, weight, *geometry)
    return Choice(
        "depthwise_conv_grad_input",
        depthwise.supports(*case) or depthwise.slower(*case, size=size),
        lambda: depthwise.prepare_grad_input(grad_output, weight, size, *geometry),
        lambda: depthwise.describe("grad_input", g_like(), w_like(), *geometry, size=size),
        lambda g, w: by_pytorch(g, w).contiguous(memory_format=form),
    )


def _consider_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Choice:
    size, geometry = tuple(weight_size), (tuple(stride), _pairs(padding), tuple(dilation))
    g_like, x_like = _outline(grad_output), _outline(x)
    by_pytorch = aten.prepare_grad_weight(size, x.shape[1], *geometry)
    case = ("grad_weight", grad_output, x, *geometry)
    return Choice(
        "depthwise_conv_grad_weight",
        depthwise.supports(*case) or depthwise.slower(*case, size=size),
        lambda: depthwise.prepare_grad_weight(grad_output, x, size, *geometry),
        lambda: depthwise.describe("grad_weight", g_like(), x_like(), *geometry, size=size),
        lambda g, x: by_pytorch(g, x).contiguous(),
    )


def _consider_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Choice:
    arguments = (x, weight, bias, activation, residual)
    x_like, w_like, b_like, r_like = map(_outline, (x, weight, bias, residual))
    return Choice(
        "pointwise_conv",
        pointwise.supports(*arguments) or pointwise.slower(*arguments),
        lambda: pointwise.Prepared(x, weight, activation, residual is not None),
        lambda: pointwise.describe(x_like(), w_like(), b_like(), activation, r_like()),
        lambda x, w, b, r: as_output(aten.pointwise_forward(x, w, b, activation, r), x),
    )


def _consider_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    between: str,
    activation: str,
) -> Choice:
    """One pipeline where there is one, else the two operations one after the other, each with its own choice."""
    flat = (tuple(stride), tuple(padding), tuple(dilation))
    geometry = (flat[0], _pairs(padding), flat[2])

    def separately(x: Tensor, dw: Tensor, pw: Tensor, dw_bias: Any, pw_bias: Any, residual: Any) -> Tensor:
        hidden = depthwise_forward(x, dw, dw_bias, *flat, between)
        return pointwise_forward(hidden, pw, pw_bias, residual, activation)

    def arguments(x: Any, dw: Any, pw: Any, dw_bias: Any, pw_bias: Any, residual: Any) -> tuple[Any, ...]:
        return x, dw, dw_bias, between, pw, pw_bias, activation, *geometry, residual

    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    given, outlines = arguments(*tensors), [_outline(tensor) for tensor in tensors]
    case = (x, depthwise_weight, between, pointwise_weight, activation, *geometry, residual is not None)
    return Choice(
        "separable_conv",
        separable.supports(*given) or separable.slower(*given),
        lambda: separable.Prepared(separable.plan_for(*case), x, depthwise_weight, pointwise_weight),
        lambda: separable.describe(*arguments(*(outline() for outline in outlines))),
        separately,
        "depthwise, then pointwise",
    )


def depthwise_choice(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Choice:
    """``options`` here and below: what follows the tensors in the operator's schema (see ``operators``)."""
    return _choose(_consider_forward, (x, weight, bias), *options)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return depthwise_choice(x, weight, bias, *options)(x, weight, bias)


def depthwise_grad_input(grad_output: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return _choose(_consider_grad_input, (grad_output, weight), *options)(grad_output, weight)


def depthwise_grad_weight(grad_output: Tensor, x: Tensor, *options: Any) -> Tensor:
    return _choose(_consider_grad_weight, (grad_output, x), *options)(grad_output, x)


def pointwise_choice(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Choice:
    return _choose(_consider_pointwise, (x, weight, bias, residual), activation)


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    return pointwise_choice(x, weight, bias, residual, activation)(x, weight, bias, residual)


def separable_choice(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    *options: Any,
) -> Choice:
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    return _choose(_consider_separable, tensors, *options)


def separable_forward(x: Tensor, *weights_and_options: Any) -> Tensor:
    return separable_choice(x, *weights_and_options)(x, *weights_and_options[:5])


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
