"""MobileNet v1 and its normal-convolution twin."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers import SeparableConv2d
from sepconv.models.blocks import (
    check_settings,
    classifier_head,
    conv3x3,
    conv_norm,
    initialize,
    pool_and_classify,
)

STEM = 32
# Output channels and stride of the 13 blocks. The paper prints stride 2 for the last one, next to a 7x7 input and a 7x7
# output: a misprint, every implementation has stride 1.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def same_pad(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """TensorFlow's "SAME" padding: as little as gives ceil(size / stride) outputs, the larger half at the end."""
    height, width = (max(kernel_size - (size % stride or stride), 0) for size in x.shape[2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class _MobileNetV1Body(nn.Module):
    """Stem, 13 blocks, mean over the pixels, classifier; what a block is, the subclass says."""

    def __init__(
        self,
        width_mult: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        small_images: bool = False,
        dropout: float = 0.001,
        norm_eps: float = 1e-3,
        tf_padding: bool = False,
    ) -> None:
        super().__init__()
        width_mult, num_classes, in_channels = check_settings(
            type(self).__name__, width_mult, num_classes, in_channels, dropout
        )
        widths = [max(int(width * width_mult), 8) for width in (STEM, *(width for width, _ in BLOCKS))]
        strides = [2, *(stride for _, stride in BLOCKS)]
        if small_images:
            strides[0] = strides[strides.index(2, 1)] = 1
        self.tf_padding = tf_padding
        self.strides = tuple(strides)
        paddings = [0 if tf_padding and stride > 1 else 1 for stride in strides]
        self.stem = conv_norm(conv3x3(in_channels, widths[0], strides[0], paddings[0]), eps=norm_eps)
        self.blocks = nn.Sequential(
            *(
                self.block(widths[i], widths[i + 1], strides[i + 1], paddings[i + 1], norm_eps)
                for i in range(len(BLOCKS))
            )
        )
        self.classifier = classifier_head(widths[-1], num_classes, dropout)
        initialize(self)

    def block(self, in_channels: int, out_channels: int, stride: int, padding: int, eps: float) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for stride, layer in zip(self.strides, (self.stem, *self.blocks), strict=True):
            if self.tf_padding and stride > 1:
                x = same_pad(x, 3, stride)
            x = layer(x)
        return pool_and_classify(x, self.classifier)


class MobileNetV1(_MobileNetV1Body):
    """MobileNet v1: a normal 3x3 convolution, then 13 depthwise separable ones.

    Args:
        width_mult: the paper's alpha; a layer has max(int(width * width_mult), 8) channels.
        num_classes: outputs of the classifier. Published TensorFlow weights have 1001: class 0 is "background".
        in_channels: channels of the images.
        small_images: for 32x32 pixels and less: the stem and the first block of stride 2 keep the size, so that the
            network shrinks an image 8-fold instead of 32-fold (32x32 ends as 4x4, digits of 8x8 as 1x1).
        dropout: before the classifier.
        norm_eps: epsilon of the batch normalisations; 1e-3 as in TensorFlow and in Hugging Face's weights.
        tf_padding: pad layers of stride 2 as TensorFlow does (images of even size: nothing above and on the left, one
            pixel below and on the right). Weights trained in TensorFlow, Hugging Face's among them, need it.

    Shape:
        x: (N, in_channels, H, W)    ->    (N, num_classes)

    Parameters: 4,231,976; multiply-adds: 568,740,352 for an image of 224x224 (width_mult 1, 1000 classes).

    Example:
        >>> import torch
        >>> MobileNetV1(0.25, num_classes=10).eval()(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])

    Reference: Howard et al. 2017, arXiv:1704.04861; ReLU6 and norm_eps as in its TF-slim code.
    """

    def block(self, in_channels: int, out_channels: int, stride: int, padding: int, eps: float) -> nn.Module:
        return SeparableConv2d(
            in_channels,
            out_channels,
            3,
            stride,
            padding,
            bias=False,
            norm=partial(nn.BatchNorm2d, eps=eps),
            activation="relu6",
        )


class MobileNetV1Normal(_MobileNetV1Body):
    """MobileNet v1 with a normal 3x3 convolution in place of each separable one.

    The paper's Table 4 calls it "Conv MobileNet". Arguments and shapes are those of :class:`MobileNetV1`.

    Parameters: 29,294,088; multiply-adds: 4,867,293,184 for an image of 224x224 (width_mult 1, 1000 classes).
    """

    def block(self, in_channels: int, out_channels: int, stride: int, padding: int, eps: float) -> nn.Module:
        return conv_norm(conv3x3(in_channels, out_channels, stride, padding), eps=eps)
