"""What a network returns, whatever its structure, and how far two networks' outputs are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors in whatever a network returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, tuple | list):
        return [t for value in output for t in tensors(value)]
    if is_dataclass(output) and not isinstance(output, type):
        return [t for key in fields(output) for t in tensors(getattr(output, key.name))]
    return []


def difference(wanted: list[Tensor], given: list[Tensor], approximated: str) -> float:
    """The squared difference of two networks' outputs.

    Raises:
        ValueError: they have different sizes.
    """
    before, after = ([tuple(t.shape) for t in outputs] for outputs in (wanted, given))
    if before != after:
        raise ValueError(
            f"convert: the outputs of the model change their shapes from {before} to {after} where {approximated} is "
            "approximated; let the model return outputs whose shapes do not depend on values"
        )
    return sum(float((w.double() - g.double()).square().sum()) for w, g in zip(wanted, given, strict=True))


@dataclass
class OutputError:
    """The squared error of outputs, batch after batch, relative to their variance over the images."""

    error: float = 0.0
    squares: float = 0.0
    sums: dict[tuple[int, torch.Size], tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, wanted: list[Tensor], given: list[Tensor]) -> None:
        self.error += difference(wanted, given, "the network")
        for i, want in enumerate(wanted):
            rows = want.double().reshape(len(want) if want.dim() else 1, math.prod(want.shape[1:]))
            self.squares += float(rows.square().sum())
            key = i, want.shape[1:]
            total, count = self.sums.get(key, (rows.new_zeros(rows.shape[1]), 0))
            self.sums[key] = total + rows.sum(0), count + len(rows)

    def relative(self) -> float:
        """To the squares themselves where the outputs are the same for all images, absolute where they are zero."""
        explained = sum(float(total.square().sum()) / count for total, count in self.sums.values() if count)
        variance = self.squares - explained
        return self.error / ((variance if variance > 1e-12 * self.squares else self.squares) or 1.0)
