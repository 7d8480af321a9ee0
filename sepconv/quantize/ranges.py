"""Which numbers 256 steps should reach from and to: those with the least squared error, seen from a histogram.

The least and the largest value make steps too wide where a few values lie far out. A narrower range cuts those and has
finer steps for all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 2048
SHARES = 48
"""Ranges tried on each side, from the whole one down."""

LEAST_SHARE = 0.02

RANGES = ("mse", "minmax")


def value_range(parts: Sequence[Tensor], method: str) -> tuple[Tensor, Tensor]:
    """The least and the largest number that steps shall reach, of values in parts.

    Args:
        method: "mse" or "minmax".
    """
    low, high = (torch.stack([getattr(part, f"a{end}")().double() for part in parts]) for end in ("min", "max"))
    least, largest = low.min().clamp_max(0), high.max().clamp_min(0)
    if method == "minmax" or largest - least <= 0:
        return least, largest
    width = (largest - least) / BINS
    counts = sum(torch.histc(part.float(), BINS, float(least), float(largest)).double() for part in parts)
    assert isinstance(counts, Tensor)
    centres = least + width * (torch.arange(BINS, dtype=torch.float64, device=counts.device) + 0.5)
    return _best(centres, counts, least, largest)


def _best(centres: Tensor, counts: Tensor, least: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends in turn, until neither moves: the error has one valley in each."""
    shares = torch.logspace(0, torch.tensor(LEAST_SHARE).log10().item(), SHARES, dtype=torch.float64).to(counts.device)
    low, high = least, largest
    for _ in range(3):
        before = low, high
        if largest > 0:
            errors = torch.stack([_error(centres, counts, low, high_) for high_ in largest * shares])
            high = (largest * shares)[errors.argmin()]
        if least < 0:
            errors = torch.stack([_error(centres, counts, low_, high) for low_ in least * shares])
            low = (least * shares)[errors.argmin()]
        if (low, high) == before:
            break
    return low, high


def _error(centres: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared error of all values: what is cut off, and the mean of the rounding of the rest."""
    outside = centres - centres.clamp(low, high)
    step = (high - low) / 255
    inside = (outside == 0) & (centres.abs() > step / 2)  # zero itself is one of the steps
    return (counts * outside.square()).sum() + (counts * inside).sum() * step.square() / 12
