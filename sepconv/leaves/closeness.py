"""How close a network's outputs are to those of the network that it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sepconv.leaves.outputs import Spread, checked_weights, leaves, said

IMAGE_CHANNELS = (1, 3)
SLACK = 0.1
"""Part of the range by which images with values from 0 to 1 may exceed it."""


@dataclass(frozen=True)
class LeafScore:
    """One output compared.

    Attributes:
        name: its place in what the network returns, "" where that is one tensor.
        relative_error: squared error, relative to how much the output varies from sample to sample.
        weight: its share in the whole.
        psnr: peak signal to noise ratio in decibels of images in a known range; None for anything else.
        agreement: share of samples with the same largest number, of outputs (N, classes); None for anything else.
    """

    name: str
    relative_error: float
    weight: float
    psnr: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Closeness:
    """All outputs compared, on so many samples."""

    leaves: tuple[LeafScore, ...]
    samples: int

    @property
    def relative_error(self) -> float:
        """The weighted mean over the outputs."""
        return sum(leaf.weight * leaf.relative_error for leaf in self.leaves)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a record; a perfect PSNR, which is infinite, is left out."""
        rows = [{key: value for key, value in asdict(leaf).items() if value is not None} for leaf in self.leaves]
        rows = [{key: value for key, value in row.items() if value != math.inf} for row in rows]
        return {"relative_error": self.relative_error, "samples": self.samples, "outputs": rows}

    def __str__(self) -> str:
        rows = [f"{said(leaf.name)}: {_measured(leaf)}" for leaf in self.leaves]
        return "\n".join([f"relative error {self.relative_error:.3g} on {self.samples} samples", *rows])


def _measured(leaf: LeafScore) -> str:
    parts = [f"relative error {leaf.relative_error:.3g}"]
    parts += [] if leaf.psnr is None else [f"PSNR {leaf.psnr:.2f} dB"]
    return ", ".join(parts + ([] if leaf.agreement is None else [f"agreement {leaf.agreement:.1%}"]))


@dataclass
class _Sums:
    """Of one leaf, batch after batch."""

    error: float = 0.0
    same: int = 0
    rows: int = 0
    is_image: bool = True
    spread: Spread = field(default_factory=Spread)

    def add(self, wanted: Tensor, given: Tensor) -> None:
        self.spread.add(wanted)
        self.error += float((wanted.double() - given.double()).square().sum())
        self.is_image &= wanted.dim() == 4 and wanted.shape[1] in IMAGE_CHANNELS
        if wanted.dim() == 2 and wanted.shape[1] > 1:
            self.rows += len(wanted)
            self.same += int((wanted.argmax(1) == given.argmax(1)).sum())

    def score(self, name: str, weight: float, data_range: float | None) -> LeafScore:
        relative = self.error / self.spread.variance()
        agreement = self.same / self.rows if self.rows else None
        return LeafScore(name, relative, weight, self._psnr(data_range), agreement)

    def _psnr(self, data_range: float | None) -> float | None:
        if not self.is_image or not self.spread.values:
            return None
        if data_range is None and self.spread.low >= -SLACK and SLACK < self.spread.high <= 1 + SLACK:
            data_range = 1.0
        if data_range is None:
            return None
        mean = self.error / self.spread.values
        return 10 * math.log10(data_range**2 / mean) if mean else math.inf


class OutputComparison:
    """Two networks' outputs side by side, batch after batch.

    Args:
        weights: how much outputs count, by name; 1 where they are not named.
        data_range: of images that the network gives, such as 255, for their PSNR. Outputs (N, 1 or 3, H, W) from 0 to 1
            are taken for images without it.
        caller: for messages.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        data_range: float | None = None,
        caller: str = "evaluate",
        approximated: str = "the network",
    ) -> None:
        if data_range is not None and not 0 < data_range < math.inf:
            raise ValueError(f"{caller}: data_range must be above 0 and finite, got {data_range!r}")
        self._weights, self._data_range = weights, data_range
        self._caller, self._approximated = caller, approximated
        self._sums: dict[str, _Sums] = {}
        self._samples = 0

    @torch.no_grad()
    def add(self, wanted: Any, given: Any, samples: int) -> None:
        """What the two networks answer to a batch.

        Raises:
            ValueError: their outputs have different names or shapes.
        """
        before, after = leaves(wanted), leaves(given)
        check_shapes(before, after, self._approximated, self._caller)
        self._samples += samples
        for name, want in before.items():
            self._sums.setdefault(name, _Sums()).add(want, after[name])

    def result(self) -> Closeness | None:
        """None where the networks have no outputs in which a difference shows."""
        if not self._sums:
            return None
        weights = checked_weights(self._sums, self._weights, self._caller)
        scores = (sums.score(name, weights[name], self._data_range) for name, sums in self._sums.items())
        return Closeness(tuple(scores), self._samples)


def check_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], approximated: str, caller: str) -> None:
    """ValueError where two networks' outputs cannot be compared."""
    before, after = ({name: tuple(t.shape) for name, t in found.items()} for found in (wanted, given))
    if before != after:
        shown = [list(shapes.values()) if before.keys() == after.keys() else shapes for shapes in (before, after)]
        raise ValueError(
            f"{caller}: the outputs of the model change their shapes from {shown[0]} to {shown[1]} where "
            f"{approximated} is approximated; let the model return outputs whose shapes do not depend on values"
        )
