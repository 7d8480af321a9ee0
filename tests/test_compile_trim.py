"""Taps that never meet the image are no work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepconv.compile import compile

CASES = {
    "far_apart": (nn.Conv2d(7, 5, 3, padding=24, dilation=24), (11, 13), "pointwise", 7 * 5),
    "one_dimension": (nn.Conv2d(7, 5, 3, padding=12, dilation=12), (11, 17), "normal", 7 * 5 * 3),
    "larger_than_the_image": (nn.Conv2d(7, 5, 7, padding=3), (2, 1), "normal", 7 * 5 * 3),
    "strided": (nn.Conv2d(7, 5, 5, stride=4, padding=4, dilation=2), (3, 3), "normal", 7 * 5 * 4),
    "depthwise": (nn.Conv2d(7, 7, 9, padding=4, groups=7), (3, 5), "depthwise", 7 * 5 * 9),
    "all_needed": (nn.Conv2d(7, 5, 3, padding=10, dilation=10), (11, 11), "normal", 7 * 5 * 9),
    "padding_alone": (nn.Conv2d(7, 5, 1, stride=5, padding=2), (2, 2), "normal", 7 * 5),
}


@pytest.mark.parametrize("name", CASES)
def test_taps_that_meet_padding_alone_are_cut(name: str) -> None:
    layer, size, kind, macs = CASES[name]
    x = torch.randn(2, 7, *size)
    compiled = compile(layer.eval(), x)
    [group] = [group for group in compiled.explain().groups if group.kind != "copy"]
    assert group.kind == kind
    pixels = group.shape[0] * group.shape[2] * group.shape[3]
    assert group.macs == pixels * macs
    torch.testing.assert_close(compiled(x), layer(x))
