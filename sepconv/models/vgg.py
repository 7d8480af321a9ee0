"""A small plain network of normal convolutions: the simplest teacher for a conversion."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.models.blocks import (
    check_settings,
    classifier_head,
    conv3x3,
    conv_norm,
    initialize,
    pool_and_classify,
)

WIDTHS = (32, 64, 128, 256)


class VGGSmall(nn.Module):
    """Eight normal 3x3 convolutions in four pairs, each followed by batch normalisation and ReLU.

    A 2x2 maximum between the pairs halves the image, the mean over the last pixels is classified.

    Args:
        width_mult: width of every layer; a pair has max(round(width * width_mult), 8) channels.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        dropout: before the classifier.

    Shape:
        x: (N, in_channels, H, W), H and W at least 8    ->    (N, num_classes)

    Convolution weights: 1,171,296 with three input channels.

    Reference: the manner of Simonyan & Zisserman 2015, arXiv:1409.1556.
    """

    def __init__(
        self, width_mult: float = 1.0, num_classes: int = 10, in_channels: int = 3, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width_mult, num_classes, in_channels = check_settings("VGGSmall", width_mult, num_classes, in_channels, dropout)
        widths = [max(round(width * width_mult), 8) for width in WIDTHS]
        self.stages = nn.ModuleList(
            nn.Sequential(conv_norm(conv3x3(before, width), nn.ReLU), conv_norm(conv3x3(width, width), nn.ReLU))
            for before, width in zip((in_channels, *widths), widths, strict=False)
        )
        self.classifier = classifier_head(widths[-1], num_classes, dropout)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        least = 2 ** (len(WIDTHS) - 1)
        if min(x.shape[2:]) < least:
            raise ValueError(f"VGGSmall: images must have at least {least}x{least} pixels, got {tuple(x.shape)}")
        x = self.stages[0](x)
        for stage in self.stages[1:]:
            x = stage(F.max_pool2d(x, 2))
        return pool_and_classify(x, self.classifier)
