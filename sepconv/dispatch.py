"""Which kernel computes an operation, and why a faster one does not.

Each operation has a fast kernel (Halide, CPU) and PyTorch's own, which runs everywhere. The choice depends on shapes,
strides, dtype and device alone, never on values. :func:`record` collects every choice made while it is active, so that
``sepconv.explain``, the tests and the benchmarks see what really ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sepconv.kernels import depthwise, pointwise, runtime, separable

Pairs = tuple[tuple[int, int], ...]


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
