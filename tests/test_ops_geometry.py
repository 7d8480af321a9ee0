"""NumPy's integers are sizes like Python's: where one is taken, so is the other, and what comes out is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sepconv
from sepconv import layers, models
from sepconv.train import Recipe

KINDS = (np.int64, np.int32, np.uint8)
X = torch.linspace(-1, 1, 1 * 4 * 9 * 9).reshape(1, 4, 9, 9)
W = torch.linspace(-1, 1, 8 * 9).reshape(8, 1, 3, 3)
P = torch.linspace(-1, 1, 6 * 8).reshape(6, 8, 1, 1)

FUNCTIONS: dict[str, Callable[[Callable[[int], Any]], Any]] = {
    "depthwise": lambda n: sepconv.depthwise_conv2d(X, W, None, n(2), n(1), n(2)),
    "depthwise tuples": lambda n: sepconv.depthwise_conv2d(X, W, None, (n(2), n(1)), (n(1), n(0)), [n(2), n(1)]),
    "pointwise": lambda n: sepconv.pointwise_conv2d(X, P[:, :4], None, n(2)),
    "separable": lambda n: sepconv.separable_conv2d(X, W, P, stride=n(2), padding=n(1)),
    "count": lambda n: sepconv.count(nn.Conv2d(3, 8, 3), (n(3), n(10), n(10))).macs,
}
MODULES: dict[str, Callable[[Callable[[int], Any]], nn.Module]] = {
    "DepthwiseConv2d": lambda n: layers.DepthwiseConv2d(n(4), n(3), n(2), n(1), n(1), depth_multiplier=n(2)),
    "DepthwiseConv1d": lambda n: layers.DepthwiseConv1d(n(4), (n(3),), n(2)),
    "PointwiseConv3d": lambda n: layers.PointwiseConv3d(n(4), n(6), stride=n(2)),
    "SeparableConv2d": lambda n: layers.SeparableConv2d(n(4), n(6), n(3), norm="batch", pointwise_layers=n(2)),
    "MobileNetV1": lambda n: models.MobileNetV1(n(1) * 0.25, n(7), n(1)),
    "MobileNetV2": lambda n: models.MobileNetV2(0.25, n(7), n(1), round_nearest=n(4)),
    "VGGSmall": lambda n: models.VGGSmall(n(1), n(7), n(1)),
    "ResNet": lambda n: models.ResNet(n(8), 0.5, n(7), n(1)),
    "QuickNet": lambda n: models.QuickNet(width_mult=0.25, num_classes=n(7), in_channels=n(1)),
    "create": lambda n: models.create("resnet20", num_classes=n(7), width_mult=n(1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", FUNCTIONS)
def test_functions(call: str, kind: Callable[[int], Any]) -> None:
    found, expected = FUNCTIONS[call](kind), FUNCTIONS[call](int)
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", MODULES)
def test_modules(call: str, kind: Callable[[int], Any]) -> None:
    found, expected = MODULES[call](kind), MODULES[call](int)
    assert repr(found) == repr(expected)
    assert {key: value.shape for key, value in found.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }


def test_recipe_keeps_pythons() -> None:
    recipe = Recipe(epochs=np.int64(3), batch_size=np.int32(16), seed=np.uint8(7))
    assert recipe == Recipe(epochs=3, batch_size=16, seed=7)
    assert {type(getattr(recipe, name)) for name in ("epochs", "batch_size", "seed")} == {int}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.DepthwiseConv2d(np.int64(0), 3), "in_channels must be a positive integer"),
        (lambda: layers.PointwiseConv2d(np.bool_(True), 3), "in_channels must be a positive integer"),
        (lambda: layers.PointwiseConv2d(np.float64(4), 3), "in_channels must be a positive integer"),
        (lambda: layers.DepthwiseConv2d(4, np.array([3, 3])), "kernel_size must be an integer or 2 integers"),
        (lambda: models.VGGSmall(num_classes=np.int64(0)), "num_classes must be a positive integer"),
        (lambda: models.VGGSmall(num_classes=np.bool_(True)), "num_classes must be a positive integer"),
        (lambda: models.MobileNetV1(np.bool_(True)), "width_mult must be a positive number"),
        (lambda: sepconv.count(nn.Conv2d(3, 8, 3), (3, np.int64(0), 9)), "input_shape must be positive integers"),
        (lambda: sepconv.count(nn.Conv2d(3, 8, 3), (3, True, 9)), "input_shape must be positive integers"),
    ],
)
def test_what_is_no_size_is_refused_in_numpys_kinds_too(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
