"""Second moments of what a layer's weights are multiplied with: for every group of channels, over pixels of all images.

A depthwise layer has one small matrix for each channel. Both networks are looked at: the input that the integers let
through, and the one that the original would have had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sepconv.convert.moments import CHUNK, patches
from sepconv.quantize.layers import GraphLayer

SAMPLES = 16
"""Patches for every value of a patch that are enough."""

LEAST_SAMPLES = 4096


@dataclass
class InputMoments:
    """Means and centred second moments of patches, (G, F) and (G, F, F) with G groups of F values, in float64.

    Attributes:
        xx: of the given input.
        yx: of the wanted input with the given one.
    """

    mean: Tensor
    xx: Tensor
    yx: Tensor


@torch.no_grad()
def input_moments(
    layer: GraphLayer, module: nn.Module, given: Sequence[Tensor], wanted: Sequence[Tensor]
) -> InputMoments:
    """Of the first call of a layer.

    Args:
        given, wanted: its input in the two networks, batch by batch.
    """
    features = layer.tensor(module)[0].numel()
    groups = layer.groups
    rows = max(1, SAMPLES * features if groups == 1 else LEAST_SAMPLES)
    per_sample = max(1, math.ceil(max(rows, LEAST_SAMPLES) / max(1, sum(map(len, given)))))
    generator = torch.Generator().manual_seed(0)
    sums = _Sums(groups, features, given[0].device)
    for x, y in zip(given, wanted, strict=True):
        for pair in _rows(layer, module, (x, y), per_sample, generator):
            sums.add(*pair)
    return sums.moments()


class _Sums:
    """Values count from the means of the first part, as in the moments of a conversion."""

    def __init__(self, groups: int, features: int, device: torch.device) -> None:
        self.count = 0
        self.start: tuple[Tensor, Tensor] | None = None
        self.x, self.y = (torch.zeros(groups, features, dtype=torch.float64, device=device) for _ in range(2))
        self.xx, self.yx = (
            torch.zeros(groups, features, features, dtype=torch.float64, device=device) for _ in range(2)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Shape: (G, rows, F) each."""
        if self.start is None:
            self.start = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self.start[0], y - self.start[1]
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=torch.float64)
        self.y += y.sum(1, dtype=torch.float64)
        self.xx += x.transpose(1, 2) @ x
        self.yx += y.transpose(1, 2) @ x

    def moments(self) -> InputMoments:
        assert self.start is not None
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - x[:, :, None] * x[:, None]
        yx = self.yx / self.count - y[:, :, None] * x[:, None]
        return InputMoments(x + self.start[0][:, 0], xx, yx)


def _rows(
    layer: GraphLayer, module: nn.Module, both: tuple[Tensor, Tensor], per_sample: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Patches of both inputs at the same pixels: (G, rows, F) each, in parts that fit into memory."""
    if layer.kind == "linear":
        flat = [one.flatten(0, -2) for one in both]
        most = min(len(flat[0]), per_sample * len(both[0]))
        chosen = torch.randperm(len(flat[0]), generator=generator)[:most].to(flat[0].device)
        x, y = (one[chosen][None] for one in flat)
        return [(x, y)]
    conv = layer.like_conv(module)
    sizes = _output_size(conv, both[0].shape[2:])
    chosen = torch.randperm(math.prod(sizes), generator=generator)[:per_sample].sort().values
    features = both[0].shape[1] * math.prod(conv.kernel_size)
    images = max(1, CHUNK // (len(chosen) * features))
    parts = []
    for start in range(0, len(both[0]), images):
        x, y = (_grouped(patches(conv, one[start : start + images], sizes, chosen), layer.groups) for one in both)
        parts.append((x, y))
    return parts


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
