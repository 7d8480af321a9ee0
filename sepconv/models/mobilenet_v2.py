"""MobileNet v2: inverted residuals with linear bottlenecks."""

from __future__ import annotations

from torch import Tensor, nn

from sepconv.layers import DepthwiseConv2d, PointwiseConv2d
from sepconv.layers.fused import at_once
from sepconv.layers.stage import in_sequence, nested
from sepconv.models.blocks import (
    check_settings,
    classifier_head,
    conv3x3,
    conv_norm,
    initialize,
    pool_and_classify,
)
from sepconv.ops.geometry import positive

# Expansion t, output channels c, repetitions n, stride s of the first repetition: Table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280


def round_channels(channels: float, nearest: int) -> int:
    """The nearest multiple, never more than 10 % below."""
    rounded = max(nearest, int(channels + nearest / 2) // nearest * nearest)
    return rounded if rounded >= 0.9 * channels else rounded + nearest


class InvertedResidual(nn.Module):
    """Pointwise expansion by ``expand_ratio``, depthwise 3x3, pointwise projection without activation.

    The input is added where stride and channels allow it.

    Shape:
        x: (N, C, H, W)    ->    (N, O, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        self.use_shortcut = stride == 1 and in_channels == out_channels
        expansion = [conv_norm(PointwiseConv2d(in_channels, hidden, bias=False))] if expand_ratio != 1 else []
        self.conv = nn.Sequential(
            *expansion,
            conv_norm(DepthwiseConv2d(hidden, 3, stride, 1, bias=False)),
            PointwiseConv2d(hidden, out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        stages = in_sequence(self.conv)
        y = None if stages is None else at_once(x, stages, around=nested(self.conv))
        if y is None:
            y = self.conv(x)
        return x + y if self.use_shortcut else y


class MobileNetV2(nn.Module):
    """MobileNet v2. The names in its state_dict are torchvision's, whose weights load unchanged.

    Args:
        width_mult: width of every layer, rounded to multiples of ``round_nearest``; the last one never shrinks below
            1280.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        small_images: for 32x32 pixels and less: the stem and the first block of stride 2 keep the size, so that the
            network shrinks an image 8-fold instead of 32-fold.
        dropout: before the classifier.
        round_nearest: channels are multiples of this; 1 turns the rounding off.

    Shape:
        x: (N, in_channels, H, W)    ->    (N, num_classes)

    Parameters: 3,504,872; multiply-adds: 300,774,272 for an image of 224x224 (width_mult 1, 1000 classes).

    Reference: Sandler et al. 2018, arXiv:1801.04381.
    """

    def __init__(
        self,
        width_mult: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        small_images: bool = False,
        dropout: float = 0.2,
        round_nearest: int = 8,
    ) -> None:
        super().__init__()
        width_mult, num_classes, in_channels = check_settings(
            "MobileNetV2", width_mult, num_classes, in_channels, dropout
        )
        round_nearest = positive("MobileNetV2", "round_nearest", round_nearest)
        width = round_channels(STEM * width_mult, round_nearest)
        features: list[nn.Module] = [conv_norm(conv3x3(in_channels, width, 1 if small_images else 2))]
        for stage, (expand_ratio, channels, repetitions, stride) in enumerate(STAGES):
            out_channels = round_channels(channels * width_mult, round_nearest)
            for i in range(repetitions):
                keeps_size = i > 0 or (small_images and stage == 1)
                features.append(InvertedResidual(width, out_channels, 1 if keeps_size else stride, expand_ratio))
                width = out_channels
        last = round_channels(LAST * max(1.0, width_mult), round_nearest)
        self.features = nn.Sequential(*features, conv_norm(PointwiseConv2d(width, last, bias=False)))
        self.classifier = classifier_head(last, num_classes, dropout)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return pool_and_classify(self.features(x), self.classifier)
