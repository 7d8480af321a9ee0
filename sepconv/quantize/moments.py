"""Second moments of what a layer's weights are multiplied with: for every group of channels, over pixels of all images.

A depthwise layer has one small matrix for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.convert.moments import CHUNK, patches
from sepconv.quantize.layers import GraphLayer

SAMPLES = 16
"""Patches for every value of a patch that are enough."""

LEAST_SAMPLES = 4096

TOGETHER = 2304
"""Values of a patch whose second moments are one matrix; of more than these, parts that are taken for independent."""


@dataclass
class InputMoments:
    """Centred second moments of patches, (G*parts, F, F) in float64, with G groups of up to ``parts`` times F values.

    Where the parts of a patch hold more than it has, the last values are zeros.
    """

    xx: Tensor
    parts: int = 1


@torch.no_grad()
def input_moments(layer: GraphLayer, module: nn.Module, given: Sequence[Tensor]) -> InputMoments:
    """Of the first call of a layer.

    Args:
        given: its input, batch by batch.
    """
    values = layer.tensor(module)[0].numel()
    parts = math.ceil(values / TOGETHER)
    features = math.ceil(values / parts)
    rows = max(LEAST_SAMPLES, SAMPLES * features if layer.groups == 1 else 0)
    per_sample = max(1, math.ceil(rows / max(1, sum(map(len, given)))))
    generator = torch.Generator().manual_seed(0)
    sums = _Sums(layer.groups * parts, features, given[0].device)
    for x in given:
        for part in _rows(layer, module, x, per_sample, generator):
            sums.add(_divided(part, parts, features))
    return InputMoments(sums.moments(), parts)


def _divided(x: Tensor, parts: int, features: int) -> Tensor:
    """(G, rows, C) -> (G*parts, rows, F)"""
    if parts == 1:
        return x
    x = F.pad(x, (0, parts * features - x.shape[2]))
    return x.unflatten(2, (parts, features)).transpose(1, 2).flatten(0, 1)


class _Sums:
    """Values count from the means of the first part, as in the moments of a conversion."""

    def __init__(self, groups: int, features: int, device: torch.device) -> None:
        self.count = 0
        self.start: Tensor | None = None
        self.x = torch.zeros(groups, features, dtype=torch.float64, device=device)
        self.xx = torch.zeros(groups, features, features, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Shape: (G, rows, F)"""
        if self.start is None:
            self.start = x.mean(1, keepdim=True)
        x = x - self.start
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=torch.float64)
        self.xx += x.transpose(1, 2) @ x

    def moments(self) -> Tensor:
        x = self.x / self.count
        return self.xx / self.count - x[:, :, None] * x[:, None]


def _rows(
    layer: GraphLayer, module: nn.Module, x: Tensor, per_sample: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Patches, (G, rows, F), in parts that fit into memory."""
    if layer.kind == "linear":
        rows = x.flatten(0, -2)
        most = min(len(rows), per_sample * len(x))
        yield rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)][None]
        return
    conv = layer.like_conv(module)
    sizes = _output_size(conv, x.shape[2:])
    chosen = torch.randperm(math.prod(sizes), generator=generator)[:per_sample].sort().values
    images = max(1, CHUNK // (len(chosen) * x.shape[1] * math.prod(conv.kernel_size)))
    for part in x.split(images):
        yield _grouped(patches(conv, part, sizes, chosen), layer.groups)


def _grouped(p: Tensor, groups: int) -> Tensor:
    """(N, S, C, k) -> (G, N*S, C/G*k)"""
    rows = p.flatten(0, 1)
    return rows.reshape(len(rows), groups, -1).transpose(0, 1)


def _output_size(conv: nn.modules.conv._ConvNd, size: Sequence[int]) -> list[int]:
    total = conv._reversed_padding_repeated_twice
    sizes = []
    for i, pixels in enumerate(size):
        at = 2 * (len(size) - 1 - i)
        whole = pixels + total[at] + total[at + 1]
        sizes.append((whole - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1)
    return sizes
