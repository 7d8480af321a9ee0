"""Calibration data: unlabelled, as a network takes it, in batches that fit into memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.leaves import Inputs
from sepconv.leaves.inputs import joined, refuse_single_samples

NAME = "convert: calibration"

MOST_SAMPLES, MOST_BYTES = 10_000, 2 << 30
"""That are taken from a loader, which may be a whole data set, or may never end."""


class CalibrationImages:
    """Unlabelled calibration data, cut into batches of a memory-friendly size.

    Args:
        source: a float tensor (N, C, *), or an iterable of batches such as a ``DataLoader``; what a batch may be says
            :meth:`sepconv.leaves.Inputs.of`. Of more than ``MOST_SAMPLES`` samples or ``MOST_BYTES`` that no list or
            tuple holds, the first are taken, and a warning says so.
        device, dtype: where the model wants them.
        name: of the caller and its argument, for messages.
    """

    def __init__(
        self,
        source: Tensor | Inputs | Iterable[Any],
        device: torch.device,
        dtype: torch.dtype,
        name: str = NAME,
    ) -> None:
        parts = [_check(source, name)] if isinstance(source, Tensor | Inputs) else _taken(source, name)
        self._parts = [part for part in parts if len(part)]
        if not self._parts:
            raise ValueError(f"{name} holds no images")
        if all(part.divisible for part in self._parts) and len({part.structure for part in self._parts}) == 1:
            self._parts = [joined(self._parts)]  # how the caller cut them makes no difference to the result
        self._device, self._dtype = device, dtype
        self._chosen = [torch.arange(len(part)) for part in self._parts]

    @property
    def count(self) -> int:
        return sum(len(chosen) for chosen in self._chosen)

    @classmethod
    def of(cls, model: nn.Module, source: Tensor | Inputs | Iterable[Any], name: str = NAME) -> CalibrationImages:
        """As the parameters of a model are."""
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return cls(source, first.device, first.dtype, name)

    def batches(self, limit: int | None = None) -> Iterator[Inputs]:
        """All samples, or the first ``limit``."""
        left = self.count if limit is None else min(limit, self.count)
        for part, chosen in zip(self._parts, self._chosen, strict=True):
            size = max(8, min(128, (1 << 21) // part.values_per_sample)) if part.divisible else len(part)
            for places in chosen[:left].split(size) if len(chosen) else ():
                yield part[places].to(self._device, self._dtype)
            left -= min(left, len(chosen))
            if not left:
                return

    def divided(self, every: int) -> tuple[CalibrationImages, CalibrationImages]:
        """All but every so-manieth sample, and those; nothing is copied. What cannot be divided counts as one."""
        most, few = copy.copy(self), copy.copy(self)
        most._chosen, few._chosen = [], []
        number = 0
        for part, chosen in zip(self._parts, self._chosen, strict=True):
            units = len(chosen) if part.divisible else 1
            out = (torch.arange(number + 1, number + units + 1) % every == 0).expand(len(chosen))
            most._chosen.append(chosen[~out])
            few._chosen.append(chosen[out])
            number += units
        return most, few


def _taken(source: Iterable[Any], name: str) -> list[Inputs]:
    """The batches of a loader, as far as they are looked at."""
    refuse_single_samples(source, name)
    bounded = not isinstance(source, Sequence)
    parts: list[Inputs] = []
    samples = size = 0
    for batch in source:
        if bounded and (samples >= MOST_SAMPLES or size >= MOST_BYTES):
            warnings.warn(
                f"{name} has more than the {samples:,} samples ({size >> 20:,} MB) that are looked at", stacklevel=2
            )
            break
        parts.append(part := _check(batch, name))
        samples += len(part)
        size += sum(t.numel() * t.element_size() for t in part.tensors)
    return parts


def _check(part: Any, name: str) -> Inputs:
    try:
        inputs = Inputs.of(part)
    except TypeError as error:
        raise TypeError(f"{name} {error}") from None
    for images in inputs.tensors:
        if images.dtype == torch.uint8:
            raise TypeError(f"{name} images must be floating point, got {images.dtype}")
        if images.is_meta:
            raise ValueError(f"{name} images have no values (they are on the meta device)")
        if images.is_floating_point() and not images.isfinite().all():
            raise ValueError(f"{name} images hold NaN or infinity")
    if inputs.tensor is not None and inputs.tensor.dim() < 2:
        raise ValueError(f"{name} images must have shape (N, C, *), got {tuple(inputs.tensor.shape)}")
    return inputs.map(torch.Tensor.detach)
