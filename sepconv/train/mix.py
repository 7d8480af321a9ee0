"""Images mixed in pairs, and their labels in the same shares: examples between those of the training set.

Written here because torchvision's, which does the same, would have to be of the very release that fits PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F


@dataclass(frozen=True)
class Mix:
    """Mixup (the mean of two images) and cutmix (a rectangle of one in the other) of a batch.

    Each image is mixed with its neighbour in the batch, in a share drawn for it alone from Beta(alpha, alpha): 1 makes
    all shares equally likely, less leaves most images nearly whole.
    Where both are wanted, a coin decides for each image.

    Args:
        mixup: alpha of mixup (Zhang et al. 2018, arXiv:1710.09412); 0 for none.
        cutmix: alpha of cutmix (Yun et al. 2019, arXiv:1905.04899); 0 for none.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mixed images and the probability of each class, drawn with PyTorch's global generator of the CPU.

        Shape:
            images (N, C, H, W), labels (N,)  ->  (N, C, H, W), (N, num_classes)
        """
        cut = torch.rand(len(images)) < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        share = torch.where(cut, _shares(self.cutmix, len(images)), _shares(self.mixup, len(images)))
        inside = _rectangles(share, images.shape[2], images.shape[3])
        share = torch.where(cut, inside.float().mean((1, 2)), share).to(images.device)
        cut, inside = cut.to(images.device), inside.to(images.device)
        of_other = torch.where(cut[:, None, None], inside, share[:, None, None].to(images.dtype))[:, None]
        mixed = images.lerp(images.roll(1, 0), of_other.expand_as(images).to(images.dtype))
        classes = F.one_hot(labels, num_classes).to(share.dtype)
        return mixed, classes.lerp(classes.roll(1, 0), share[:, None].expand_as(classes))


def _shares(alpha: float, count: int) -> Tensor:
    """Of the other image in each: (count,), from 0 to 1; all 0 where alpha is."""
    return Beta(alpha, alpha).sample((count,)) if alpha else torch.zeros(count)


def _rectangles(share: Tensor, height: int, width: int) -> Tensor:
    """Which pixels a rectangle covers that has the image's form, about `share` of its area and any place: (N, H, W)."""
    inside = []
    for size in (height, width):
        length = (share.sqrt() * size).round()
        begin = (torch.rand(len(share)) * (size + 1 - length)).floor()
        after = torch.arange(size) - begin[:, None]
        inside.append((after >= 0) & (after < length[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
