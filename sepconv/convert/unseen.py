"""What one layer's answers lack on images that it was not fitted to: a sample of patches and of what it should give."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.moments import patches

PATCHES = 2048
"""Enough to know an error to some hundredths."""


class Unseen:
    """A layer's patches p, its answers to them, and what these lack, on a few pixels of every image."""

    def __init__(self, conv: _ConvNd, images: int) -> None:
        self.conv = conv
        self.pixels = math.ceil(PATCHES / max(1, images))
        self._patches: list[Tensor] = []
        self._wanted: list[Tensor] = []
        self._lack: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, target: Tensor | None, generator: torch.Generator) -> None:
        """Take pixels of every image.

        Shape:
            x: (N, C, *)    y = conv(x): (N, O, *)    target: like y; y itself unless given
        """
        chosen = torch.randperm(math.prod(y.shape[2:]), generator=generator)[: self.pixels]
        wanted, given = (_rows(t, chosen) for t in (y if target is None else target, y))
        self._patches.append(patches(self.conv, x, y.shape[2:], chosen).flatten(2).flatten(0, 1))
        self._wanted.append(wanted)
        self._lack.append(wanted - given)

    def relative_error(self, weight: Tensor, shift: Tensor, metric: Tensor) -> float:
        """The metric's squared error of a layer with that weight and ``shift`` on its bias, relative to the variance.

        Shape:
            weight: (O, C, k)    shift: (O,)    metric: (O, O)
        """
        p, wanted, lack = (torch.cat(parts) for parts in (self._patches, self._wanted, self._lack))
        change = weight.flatten(1) - self.conv.weight.detach().flatten(1)
        errors = lack.double() - (p @ change.to(p).T).double() - shift
        wanted = wanted.double() - wanted.double().mean(0)
        error, whole = (float(((values @ metric) * values).sum()) for values in (errors, wanted))
        return error / max(whole, 1e-300)


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """(N, O, *) -> (N * pixels, O)."""
    return values.flatten(2)[:, :, chosen.to(values.device)].transpose(1, 2).flatten(0, 1)
