"""Random flips and crops of a whole batch at once, the same for any number of processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def generator(*key: int) -> torch.Generator:
    """A random generator that depends on the numbers in `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Augment:
    """Horizontal flips and crops at random offsets of the zero-padded image.

    Args:
        flip: mirror each image with probability one half. Wrong for digits and letters.
        crop_padding: pixels of zeros around the image before it is cropped back to its size.
    """

    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"Augment: crop_padding must be at least 0 but is {self.crop_padding}")

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        """Shape: images (N, C, H, W) and draw (N, 3) from `draw`  ->  (N, C, H, W), channels_last."""
        height, width = images.shape[-2:]
        rows = draw[:, 0, None] + torch.arange(height)
        columns = draw[:, 1, None] + torch.arange(width)
        columns = torch.where(draw[:, 2, None] > 0, columns.flip(1), columns)
        padded = F.pad(images, [self.crop_padding] * 4).permute(0, 2, 3, 1)
        batch = torch.arange(len(images))[:, None, None]
        return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Row offset, column offset and whether to flip, for `count` images: (count, 3)."""
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=random)
        flips = torch.randint(0, 2, (count, 1), generator=random) * int(self.flip)
        return torch.cat([offsets, flips], dim=1)
