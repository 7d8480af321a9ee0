"""What a network gives: its floating point outputs by name, and how much each of them counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def leaves(output: Any) -> dict[str, Tensor]:
    """The floating point tensors in whatever a network returns, by their place in it.

    Example:
        >>> list(leaves({"boxes": torch.ones(1), "heads": (torch.ones(2), torch.ones(3))}))
        ['boxes', 'heads.0', 'heads.1']
        >>> list(leaves(torch.ones(1)))
        ['']
    """
    return dict(_walk(output, ""))


def _walk(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
        return
    for key, value in _entries(output):
        yield from _walk(value, f"{name}.{key}" if name else key)


def _entries(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]
    if isinstance(output, tuple | list):
        return list(zip(getattr(output, "_fields", map(str, range(len(output)))), output, strict=True))
    if is_dataclass(output) and not isinstance(output, type):
        return [(entry.name, getattr(output, entry.name)) for entry in fields(output)]
    return []


def said(name: str) -> str:
    """A leaf in words."""
    return f"output {name!r}" if name else "the output"


def checked_weights(names: Iterable[str], weights: Mapping[str, float] | None, caller: str) -> dict[str, float]:
    """How much each leaf counts: 1, unless it is named; their sum is 1 where nothing is.

    Raises:
        ValueError: there is no such leaf, or nothing is left to count.
    """
    found = dict.fromkeys(names, 1.0)
    for name, weight in (weights or {}).items():
        if name not in found:
            known = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"{caller}: output_weights names {name!r}, but the outputs of the network are {known}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"{caller}: output_weights must be finite and at least 0, got {weight!r} for {name!r}")
        found[name] = float(weight)
    total = sum(found.values())
    if found and not total:
        raise ValueError(f"{caller}: output_weights leave no output to compare")
    return {name: weight / total for name, weight in found.items()}


@dataclass
class Spread:
    """How much a leaf varies from sample to sample, batch after batch: what its errors are relative to."""

    squares: float = 0.0
    values: int = 0
    low: float = math.inf
    high: float = -math.inf
    sums: dict[torch.Size, tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, leaf: Tensor) -> None:
        rows = leaf.detach().double().reshape(len(leaf) if leaf.dim() else 1, math.prod(leaf.shape[1:]))
        if not rows.numel():
            return
        self.squares += float(rows.square().sum())
        self.values += rows.numel()
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        total, count = self.sums.get(leaf.shape[1:], (rows.new_zeros(rows.shape[1]), 0))
        self.sums[leaf.shape[1:]] = total + rows.sum(0), count + len(rows)

    @property
    def samples(self) -> int:
        return sum(count for _, count in self.sums.values())

    def variance(self) -> float:
        """Summed squares around the mean of all samples; the squares themselves where all samples have the same."""
        explained = sum(float(total.square().sum()) / count for total, count in self.sums.values())
        variance = self.squares - explained
        return (variance if variance > 1e-12 * self.squares else self.squares) or 1.0
