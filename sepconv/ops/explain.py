"""Which kernel was chosen, why, and how a choice is remembered.

:func:`record` collects every choice made while it is active, so that ``sepconv.explain``, the tests and the benchmarks
see what really ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.halide.jit import runtime

MAX_CHOICES = 4096
HALF = (torch.bfloat16, torch.float16)
"""Numbers of 16 bits."""
NUMBERS = (torch.float32, *HALF)


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
    """All that a choice depends on in tensors of 32 or 16 bits on the CPU; None where one is another kind of tensor."""
    found: list[Any] = []
    for t in tensors:
        if t is None:
            found.append(None)
        elif t.is_cpu and t.dtype in NUMBERS and t.layout is torch.strided and not t.is_neg():
            found.append((t.dtype, t.shape, t.stride()))
        else:
            return None
    return tuple(found)


def choose(consider: Callable[..., Choice], tensors: Sequence[Tensor | None], *others: Sequence[int] | str) -> Choice:
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


def outline(tensor: Tensor | None) -> Callable[[], Any]:
    """Makes a tensor of this size and strides without memory: a choice that is kept must not keep tensors."""
    if tensor is None:
        return lambda: None
    shape, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device="meta")


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
