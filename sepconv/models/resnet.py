"""Residual networks for small images: teachers with shortcuts."""

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
from sepconv.ops.geometry import positive

WIDTHS = (16, 32, 64)


class SubsampleAndPad(nn.Module):
    """The parameter-free shortcut ("option A"): every ``stride``-th pixel, and channels of zeros behind the old ones.

    Shape:
        x: (N, C, H, W)    ->    (N, C + extra, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two normal 3x3 convolutions around which the input is added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.first = conv_norm(conv3x3(in_channels, out_channels, stride), nn.ReLU)
        self.second = conv_norm(conv3x3(out_channels, out_channels), None)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            if shortcut == "projection":
                self.shortcut = conv_norm(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), None)
            else:
                self.shortcut = SubsampleAndPad(out_channels - in_channels, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of ``depth`` = 6n+2 layers: a 3x3 stem and three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: 20, 32, 44, 56, 110 or another 6n+2.
        width_mult: width of every layer; a stage has max(round(width * width_mult), 8) channels.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        shortcut: where a block changes the size: "identity" (the paper's option A, no parameters) or "projection"
            (option B, a 1x1 convolution).
        dropout: before the classifier.

    Shape:
        x: (N, in_channels, H, W)    ->    (N, num_classes)

    Parameters: 269,722 for depth 20 (272,474 with projections).

    Reference: He et al. 2016, arXiv:1512.03385, section 4.2.
    """

    def __init__(
        self,
        depth: int = 20,
        width_mult: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        shortcut: str = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width_mult, num_classes, in_channels = check_settings("ResNet", width_mult, num_classes, in_channels, dropout)
        depth = positive("ResNet", "depth", depth)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"ResNet: depth must be 6n+2 with n at least 1 (8, 14, 20, ...), got {depth!r}")
        if shortcut not in ("identity", "projection"):
            raise ValueError(f"ResNet: shortcut must be 'identity' or 'projection', got {shortcut!r}")
        widths = [max(round(width * width_mult), 8) for width in WIDTHS]
        self.stem = conv_norm(conv3x3(in_channels, widths[0]), nn.ReLU)
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(before, width, 2 if stage > 0 and i == 0 else 1, shortcut))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = classifier_head(before, num_classes, dropout)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return pool_and_classify(self.blocks(self.stem(x)), self.classifier)
