"""What the numbers of a value are, and which of them our kernels compute in: asked here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NumberType:
    """A stored number q stands for ``scale * (q - zero_point)``; without a scale it stands for itself."""

    storage: torch.dtype
    scale: float | None = None
    zero_point: int = 0

    def __str__(self) -> str:
        name = str(self.storage).removeprefix("torch.")
        return name if self.scale is None else f"{name} x {self.scale:.4g} from {self.zero_point}"


FLOAT32 = NumberType(torch.float32)
COMPUTED = (FLOAT32,)
"""What groups are made of. Operations that PyTorch computes may have numbers of any type."""


def not_computed(numbers: Iterable[NumberType], whose: str) -> str:
    """Why our kernels do not compute with such numbers, in a sentence; "" if they do."""
    for number in numbers:
        if number not in COMPUTED:
            return f"the kernels compute in {' and '.join(map(str, COMPUTED))} and {whose} {number.storage}"
    return ""
