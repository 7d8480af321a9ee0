"""Calibration images: unlabelled, as a network takes them, in batches that fit into memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "convert: calibration"


class CalibrationImages:
    """Unlabelled calibration images, cut into batches of a memory-friendly size.

    Args:
        source: a float tensor (N, C, *) or an iterable of such batches; of a batch (images, labels) only the images
            count.
        device, dtype: where the model wants them.
        name: of the caller and its argument, for messages.
    """

    def __init__(
        self,
        source: Tensor | Iterable[Any],
        device: torch.device,
        dtype: torch.dtype,
        name: str = NAME,
    ) -> None:
        self._parts = [_check(part, name) for part in ([source] if isinstance(source, Tensor) else source)]
        self._parts = [part for part in self._parts if len(part)]
        if len({part.shape[1:] for part in self._parts}) == 1:
            self._parts = [torch.cat(self._parts)]  # how the caller cut them makes no difference to the result
        if not self._parts:
            raise ValueError(f"{name} holds no images")
        self._device, self._dtype = device, dtype
        self._chosen = [torch.arange(len(part)) for part in self._parts]

    @property
    def count(self) -> int:
        return sum(len(chosen) for chosen in self._chosen)

    @classmethod
    def of(cls, model: nn.Module, source: Tensor | Iterable[Any], name: str = NAME) -> CalibrationImages:
        """As the parameters of a model are."""
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return cls(source, first.device, first.dtype, name)

    def batches(self, limit: int | None = None) -> Iterator[Tensor]:
        """All images, or the first ``limit``."""
        left = self.count if limit is None else min(limit, self.count)
        for part, chosen in zip(self._parts, self._chosen, strict=True):
            size = max(8, min(128, (1 << 21) // max(1, math.prod(part.shape[1:]))))
            for places in chosen[:left].split(size) if len(chosen) else ():
                yield part[places.to(part.device)].to(self._device, self._dtype)
            left -= min(left, len(chosen))
            if not left:
                return

    def divided(self, every: int) -> tuple[CalibrationImages, CalibrationImages]:
        """All but every so-manieth image, and those; nothing is copied."""
        most, few = copy.copy(self), copy.copy(self)
        number = torch.arange(self.count).split([len(chosen) for chosen in self._chosen])
        most._chosen = [c[(n + 1) % every != 0] for c, n in zip(self._chosen, number, strict=True)]
        few._chosen = [c[(n + 1) % every == 0] for c, n in zip(self._chosen, number, strict=True)]
        return most, few


def _check(part: Any, name: str) -> Tensor:
    images = part[0] if isinstance(part, tuple | list) and part else part
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name} must be a tensor or batches of tensors, got {type(images).__name__}; wrap a model of "
            "other inputs in a module that takes the images alone"
        )
    if not images.is_floating_point():
        raise TypeError(f"{name} images must be floating point, got {images.dtype}")
    if images.is_meta:
        raise ValueError(f"{name} images have no values (they are on the meta device)")
    if images.dim() < 2:
        raise ValueError(f"{name} images must have shape (N, C, *), got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError(f"{name} images hold NaN or infinity")
    return images.detach()
