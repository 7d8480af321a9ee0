"""Networks of normal convolutions that learn small photographs in few passes: teachers for a conversion."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.activations import ACTIVATIONS
from sepconv.models.blocks import Activation, check_settings, classifier_head, conv3x3, conv_norm, initialize

STEM = 24
"""Filters of the stem: twice its 2*2*3 inputs, so that they can be all principal patterns and their negatives."""
PLAIN_WIDTHS = (48, 128, 256)
RESIDUAL_WIDTHS = (48, 96, 192)
_TRIED = ("relu", "gelu", "silu")
"""Activations with which these networks were trained."""


class Shortcut(nn.Module):
    """Two normal 3x3 convolutions of equal width around which the input is added."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.body = nn.Sequential(*(conv_norm(conv3x3(width, width), activation) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class QuickNet(nn.Module):
    """A 2x2 stem, then three stages: a 3x3 convolution, a 2x2 maximum, and one or two 3x3 convolutions more.

    Halving the image between the first convolution and its norm leaves most of the work to small images, which a few
    passes over the training set teach as well. The largest value of each channel is classified.

    Args:
        residual: two further convolutions a stage with a shortcut around them, instead of one plain one.
        width_mult: width of every stage: max(round(width * width_mult), 8) of 48, 128, 256 channels (plain) or
            48, 96, 192 (residual). The stem keeps its 24.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        dropout: before the classifier.
        activation: "relu", "gelu" or "silu".

    Shape:
        x: (N, in_channels, H, W), H and W at least 9    ->    (N, num_classes)

    Convolution weights: 1,118,880 (plain), 1,088,928 (residual) with three input channels.

    Reference: the plan of Jordan 2024, arXiv:2404.00498.
    """

    def __init__(
        self,
        residual: bool = False,
        width_mult: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        width_mult, num_classes, in_channels = check_settings("QuickNet", width_mult, num_classes, in_channels, dropout)
        if activation not in _TRIED:
            raise ValueError(f"QuickNet: activation must be one of {', '.join(_TRIED)}, got {activation!r}")
        active = ACTIVATIONS[activation].module
        widths = [max(round(w * width_mult), 8) for w in (RESIDUAL_WIDTHS if residual else PLAIN_WIDTHS)]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, STEM, 2), active())
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(conv3x3(before, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), active()),
                Shortcut(width, active) if residual else conv_norm(conv3x3(width, width), active),
            )
            for before, width in zip((STEM, *widths), widths, strict=False)
        )
        self.classifier = classifier_head(widths[-1], num_classes, dropout)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 9:
            raise ValueError(f"QuickNet: images must have at least 9x9 pixels, got {tuple(x.shape)}")
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(F.adaptive_max_pool2d(x, 1).flatten(1))


VGGQuick = partial(QuickNet, False)
ResNetQuick = partial(QuickNet, True)
