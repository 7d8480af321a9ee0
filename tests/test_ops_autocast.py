"""Autocast does to the dtypes of our functions and layers what it does to those of PyTorch's convolutions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_X, _DW, _PW, _BIAS = torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3), torch.ones(4, 4, 1, 1), torch.ones(4)

_PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "depthwise": (
        lambda x, w, b: sepconv.depthwise_conv2d(x, _DW.to(w), _BIAS.to(b), padding=1),
        lambda x, w, b: F.conv2d(x, _DW.to(w), _BIAS.to(b), padding=1, groups=4),
    ),
    "pointwise": (
        lambda x, w, b: sepconv.pointwise_conv2d(x, _PW.to(w), _BIAS.to(b), activation="gelu"),
        lambda x, w, b: F.gelu(F.conv2d(x, _PW.to(w), _BIAS.to(b))),
    ),
    "residual": (
        lambda x, w, b: sepconv.pointwise_conv2d(x, _PW.to(w), residual=_X.to(b), activation="relu"),
        lambda x, w, b: F.relu(F.conv2d(x, _PW.to(w)) + _X.to(b)),
    ),
    "separable": (
        lambda x, w, b: sepconv.separable_conv2d(x, _DW.to(w), _PW.to(w), _BIAS.to(b), padding=1, activation="silu"),
        lambda x, w, b: F.silu(F.conv2d(F.conv2d(x, _DW.to(w), _BIAS.to(b), padding=1, groups=4), _PW.to(w))),
    ),
}


def _dtype(function: Callable[..., Tensor], *dtypes: torch.dtype) -> torch.dtype | None:
    """Of the result; None where the arguments do not fit together."""
    x, weight, other = dtypes
    try:
        y = function(_X.to(x), weight, other)
    except (TypeError, RuntimeError):
        return None
    assert y.isfinite().all()
    return y.dtype


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", _PAIRS)
def test_every_combination_of_dtypes(op: str, to: torch.dtype) -> None:
    ours, theirs = _PAIRS[op]
    with torch.autocast("cpu", to):
        for dtypes in itertools.product(_DTYPES, repeat=3):
            assert _dtype(ours, *dtypes) == _dtype(theirs, *dtypes), dtypes


@pytest.mark.parametrize("op", _PAIRS)
def test_autocast_that_is_off_or_of_another_device_changes_nothing(op: str) -> None:
    ours, theirs = _PAIRS[op]
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert _dtype(ours, *[torch.float32] * 3) == torch.float32
        assert _dtype(ours, *[torch.float64] * 3) == _dtype(theirs, *[torch.float64] * 3) == torch.float64
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert _dtype(ours, *[torch.float32] * 3) == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_the_dtype_of_autocast_may_be_set() -> None:
    before = torch.get_autocast_dtype("cpu")
    try:
        with torch.autocast("cpu"):
            torch.set_autocast_dtype("cpu", torch.float16)
            assert _dtype(_PAIRS["separable"][0], *[torch.float32] * 3) == torch.float16
    finally:
        torch.set_autocast_dtype("cpu", before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_layers_with_norms(training: bool, dtype: torch.dtype) -> None:
    layer: Any = sepconv.SeparableConv2d(4, 6, 3, norm="batch", activation="relu6", dtype=dtype).train(training)
    d, p = layer.depthwise, layer.pointwise
    plain = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4),
        layer.depthwise_norm,
        nn.ReLU6(),
        nn.Conv2d(4, 6, 1),
        layer.pointwise_norm,
        nn.ReLU6(),
    ).train(training)
    plain[0].weight, plain[0].bias, plain[3].weight, plain[3].bias = d.weight, d.bias, p.weight, p.bias
    x = torch.randn(2, 4, 9, 7, dtype=dtype)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
            y, expected = layer(x), plain(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-5)
