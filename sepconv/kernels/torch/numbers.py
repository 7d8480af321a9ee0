"""What a stored number stands for, and what is stored for a value: the definition, by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def read(stored: Tensor, steps: Tensor | None) -> Tensor:
    """In float32. ``steps``: scale and zero point where the tensor is uint8."""
    values = stored.float()
    return values if steps is None or stored.dtype is not torch.uint8 else (values - steps[1]) * steps[0]


def write(values: Tensor, dtype: torch.dtype, steps: Tensor | None) -> Tensor:
    """In numbers of this kind: the nearest, of two as near the even one; of uint8 between 0 and 255, and 0 of NaN."""
    if steps is None or dtype is not torch.uint8:
        return values.to(dtype)
    counts = (values * steps[0].reciprocal()).round() + steps[1]
    return counts.nan_to_num(0.0, torch.inf, -torch.inf).clamp(0, 255).to(dtype)
