"""How images become what a network takes. It belongs to the network: one trained elsewhere saw images prepared its way.

Everything is in the words and by the rules of torchvision's transforms ``Resize``, ``CenterCrop`` and ``Normalize``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
"""Name -> what ``torch.nn.functional.interpolate`` calls it."""
LARGEST_SIDE = 8192


@dataclass(frozen=True)
class Crop:
    """How an image of any size becomes a square.

    Attributes:
        size: side of the square that is cropped from the centre.
        resize: what the short side is resized to before.
        interpolation: "nearest", "bilinear" or "bicubic", antialiased when images become smaller.
        squash: resize both sides to ``resize`` instead, whatever the image's shape.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"Crop: interpolation must be one of {known} but is {self.interpolation!r}")
        if not 1 <= self.size <= self.resize <= LARGEST_SIDE:
            raise ValueError(
                f"Crop: size and resize must be pixels with 1 <= size <= resize <= {LARGEST_SIDE} "
                f"but are {self.size} and {self.resize}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Shape: uint8 (..., C, H, W) -> uint8 (..., C, size, size)"""
        height, width = images.shape[-2:]
        target = self._resized(height, width)
        if target != (height, width):
            images = _interpolate(images, target, self.interpolation)
        top, left = (round((side - self.size) / 2) for side in target)
        return images[..., top : top + self.size, left : left + self.size]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.resize, self.resize
        short = min(height, width)
        return int(self.resize * height / short), int(self.resize * width / short)

    def __str__(self) -> str:
        how = "both sides" if self.squash else "the short side"
        crop = "" if self.size == self.resize else f", centre of {self.size}x{self.size}"
        return f"{how} resized to {self.resize} ({self.interpolation}){crop}"


def _interpolate(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    batch = images.reshape(-1, *images.shape[-3:]).float()
    if interpolation == "nearest":
        resized = F.interpolate(batch, size, mode=INTERPOLATIONS[interpolation])
    else:
        resized = F.interpolate(batch, size, mode=INTERPOLATIONS[interpolation], antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8).view(*images.shape[:-2], *size)


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants of images; an entry that is None or empty is left to the data set.

    Attributes:
        fit: how images become squares.
        mean, std: per channel as the network takes them, in units of full brightness; their number says whether it
            takes grey images or coloured ones.
        bgr: whether its channels are blue, green, red.
        source: where this is from, such as "timm/resnet18".
    """

    fit: Crop | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    bgr: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, 1, 3):
            raise ValueError(
                "Preprocessing: mean and std must have 1 or 3 numbers each, one for every channel, "
                f"but have {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(number) for number in numbers) or any(value <= 0 for value in self.std):
            raise ValueError(f"Preprocessing: mean and std must be finite, std above 0, got {self.mean}, {self.std}")
        if self.bgr and len(self.mean) == 1:
            raise ValueError("Preprocessing: bgr is for networks of three channels, but mean has one number")

    @property
    def channels(self) -> int | None:
        return len(self.mean) or None

    def changed(self, **entries: Any) -> Preprocessing:
        """The same, with what is given and not None instead."""
        given = {name: value for name, value in entries.items() if value is not None}
        return replace(self, **given)

    def as_dict(self) -> dict[str, Any]:
        """As plain values for a record."""
        fit = None if self.fit is None else asdict(self.fit)
        return {"fit": fit, "mean": list(self.mean), "std": list(self.std), "bgr": self.bgr, "source": self.source}

    def sentences(self) -> list[str]:
        """What is done, for people."""
        parts = [str(self.fit)] if self.fit else []
        if self.mean:
            mean, std = (" ".join(f"{number:.4g}" for number in numbers) for numbers in (self.mean, self.std))
            parts.append(f"mean {mean}, deviation {std}")
        return parts + ["channels blue, green, red"] * self.bgr


def normalise(images: Tensor, mean: Tensor, std: Tensor, bgr: bool = False) -> Tensor:
    """uint8 (N, C, H, W), red first -> float32 (brightness - mean) / std, in the network's order of channels."""
    scale, shift = 1 / (255 * std), mean / std
    images = images.flip(-3) if bgr else images
    return images.float().mul_(scale[:, None, None]).sub_(shift[:, None, None])
