"""What the numbers of a value are, and which of them our kernels compute in: asked here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_LOWEST, _HIGHEST = 0, 255


@dataclass(frozen=True)
class NumberType:
    """A stored number q stands for ``scale * (q - zero_point)``; without a scale it stands for itself."""

    storage: torch.dtype
    scale: float | None = None
    zero_point: int = 0

    @property
    def is_float32(self) -> bool:
        return self.storage is torch.float32

    def decode(self, stored: Tensor) -> Tensor:
        """What stored numbers stand for; in float32, but for those that stand for themselves and are whole."""
        if self.scale is not None:
            return (stored.float() - self.zero_point) * self.scale
        return stored.float() if self.storage is torch.bfloat16 else stored

    def encode(self, values: Tensor) -> Tensor:
        """The stored numbers that are nearest, of two as near the even one; NaN becomes 0 where there is a scale."""
        if self.scale is None:
            return values.to(self.storage)
        steps = (values.float() * self.inverse).round() + self.zero_point
        return steps.clamp(_LOWEST, _HIGHEST).nan_to_num(0.0).to(self.storage)

    def rounded(self, values: Tensor) -> Tensor:
        """What is left of values that are stored so."""
        return self.decode(self.encode(values))

    @property
    def inverse(self) -> float:
        """One over the scale, as a number of 32 bits."""
        return float(1.0 / torch.tensor(self.scale or 1.0, dtype=torch.float32))

    def __str__(self) -> str:
        name = str(self.storage).removeprefix("torch.")
        return name if self.scale is None else f"{name} x {self.scale:.4g} from {self.zero_point}"


FLOAT32, BFLOAT16 = NumberType(torch.float32), NumberType(torch.bfloat16)
COMPUTED = (FLOAT32,)
"""What groups are made of. Operations that PyTorch computes may have numbers of any type."""


def not_computed(numbers: Iterable[NumberType], whose: str) -> str:
    """Why our kernels do not compute with such numbers, in a sentence; "" if they do."""
    for number in numbers:
        if number not in COMPUTED:
            return f"the kernels compute in {' and '.join(map(str, COMPUTED))} and {whose} {number.storage}"
    return ""
