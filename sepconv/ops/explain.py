"""Which kernel was chosen, why, and how a choice is remembered.

:func:`record` collects every choice made while it is active, so that ``sepconv.explain``, the tests and the benchmarks
see what really ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from sepconv.kernels import stages
from sepconv.kernels.backends import Choice
from sepconv.kernels.stages import StageChoice

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
    token, watched = _RECORD.set(collected), stages.watcher.set(note_stage)
    try:
        yield collected
    finally:
        _RECORD.reset(token)
        stages.watcher.reset(watched)


def recording() -> bool:
    """Whether choices are being collected."""
    return _RECORD.get() is not None


def note(choice: Explanation) -> None:
    """Add to the choices being collected."""
    collected = _RECORD.get()
    if collected is not None:
        collected.append(choice)


def note_choice(choice: Choice) -> None:
    """Add what just ran, and the parts that it was made of."""
    if not recording():
        return
    case = choice.case
    op = f"{case.op}_conv" if case.which == "forward" else f"{case.op}_conv_{case.which}"
    note(Explanation(op, choice.backend.name, choice.backend.describe(case), dict(choice.reasons)))
    for part in choice.parts:
        note_choice(part)


def note_stage(choice: StageChoice) -> None:
    """Add a pass of a stage in training that just ran."""
    case = choice.case
    op = f"{case.op}_stage" if case.which == "forward" else f"{case.op}_stage_{case.which}"
    note(Explanation(op, choice.backend.name, choice.backend.describe(case), dict(choice.reasons)))


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
