"""Random flips, crops and holes of a whole batch at once, the same for any number of processes."""

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
    """Horizontal flips, crops at random offsets of the zero-padded image, and a square of zeros at a random place.

    Args:
        flip: mirror one half of the images, the other half in the next epoch (Jordan 2024, arXiv:2404.00498), so that
            two epochs show both forms of every image. Wrong for digits and letters.
        crop_padding: pixels of zeros around the image before it is cropped back to its size.
        cutout: side in pixels of the square, whose middle lies anywhere in the image (DeVries and Taylor 2017,
            arXiv:1708.04552); 0 for none.
    """

    flip: bool = False
    crop_padding: int = 0
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"Augment: {name} must be at least 0 but is {getattr(self, name)}")

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        """Shape: images (N, C, H, W) and draw (N, 5) from `draw`  ->  (N, C, H, W), channels_last."""
        height, width = images.shape[-2:]
        rows = draw[:, 0, None] + torch.arange(height)
        columns = draw[:, 1, None] + torch.arange(width)
        columns = torch.where(draw[:, 2, None] > 0, columns.flip(1), columns)
        padded = F.pad(images, [self.crop_padding] * 4).permute(0, 2, 3, 1)
        batch = torch.arange(len(images))[:, None, None]
        cropped = padded[batch, rows[:, :, None], columns[:, None, :]]
        if self.cutout:
            inside = self._hit(draw[:, 3], height)[:, :, None] & self._hit(draw[:, 4], width)[:, None, :]
            cropped.masked_fill_(inside[..., None], 0)
        return cropped.permute(0, 3, 1, 2)

    def _hit(self, place: Tensor, size: int) -> Tensor:
        """Which positions of `size` the square covers whose middle is at `place`, a random number: (N, size)."""
        begin = place % size - self.cutout // 2
        after = torch.arange(size) - begin[:, None]
        return (after >= 0) & (after < self.cutout)

    def flips(self, count: int, seed: int, epoch: int) -> Tensor:
        """Which of a data set's `count` images are mirrored in `epoch`: int64 (count,) of 0 and 1."""
        if not self.flip:
            return torch.zeros(count, dtype=torch.int64)
        in_even_epochs = torch.randint(0, 2, (count,), generator=generator(seed))
        return in_even_epochs if epoch % 2 == 0 else 1 - in_even_epochs

    def draw(self, flips: Tensor, random: torch.Generator) -> Tensor:
        """Row offset, column offset, whether to flip, and row and column of the square, for N images: (N, 5).

        The last two are random numbers of which the remainder by the image's size counts.

        Args:
            flips: of these images, from `flips`.
        """
        count = len(flips)
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=random)
        places = torch.randint(0, 2**31 if self.cutout else 1, (count, 2), generator=random)
        return torch.cat([offsets, flips[:, None], places], dim=1)
