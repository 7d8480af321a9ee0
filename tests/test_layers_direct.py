"""Layers that come to PyTorch's operation go there at once: the same results, and not where somebody watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.kernels.halide.jit import runtime
from sepconv.layers import direct
from sepconv.ops import convolutions
from sepconv.ops.pending import Pending

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that were called; nothing is remembered."""
    seen: list[str] = []
    direct.forget()
    for layer in (sepconv.DepthwiseConv2d, sepconv.PointwiseConv2d):
        function = layer.function
        watched = lambda *given, function=function: (seen.append(function.__name__), function(*given))[1]  # noqa: E731
        monkeypatch.setattr(layer, "function", staticmethod(watched))
    return seen


def _image(channels: int = 64) -> Tensor:
    return torch.randn(4, channels, 27, 29).contiguous(memory_format=torch.channels_last).requires_grad_()


def _gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]


def _strided() -> sepconv.DepthwiseConv2d:
    """PyTorch's on every processor; one of stride 1 is so on some."""
    return sepconv.DepthwiseConv2d(64, 3, stride=2, padding=1)


@pytest.mark.parametrize("layer", [_strided(), sepconv.PointwiseConv2d(64, 24)])
def test_the_second_call_is_pytorchs_alone(layer: Any, calls: list[str]) -> None:
    x = _image()
    first, second = _gradients(layer, x), _gradients(layer, x)
    assert len(calls) == 1
    y = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)
    truth = [y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))]
    for one, other, true in zip(first, second, truth, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, true, rtol=1e-4, atol=1e-3)


def test_who_watches_or_does_not_train_gets_the_function(calls: list[str]) -> None:
    layer, x = _strided(), _image()
    for _ in range(2):
        layer(x)
    calls.clear()
    assert sepconv.explain(layer, x)[0].reasons["halide"].startswith("forward and back PyTorch's kernels")
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    layer(x[..., :3, :3])  # another size, which is ours
    layer.weight.requires_grad_(False)
    layer(x)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="depthwise_conv2d"):
        layer(_image(63))


def test_what_is_ours_stays_ours(calls: list[str]) -> None:
    layer, x = sepconv.DepthwiseConv2d(64, 5, padding=2), _image()
    for _ in range(3):
        layer(x)
    assert calls == ["depthwise_conv2d"] * 3


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_CALLS", 3)
    direct.forget()
    layer = sepconv.PointwiseConv2d(3, 4)
    for width in range(5, 15):
        layer(torch.randn(1, 3, 5, width))
        assert len(direct._calls) <= 3


def test_calls_under_autocast_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts belong to the call; another precision is another call."""
    x, weight = torch.randn(2, 16, 9, 11), torch.randn(16, 1, 3, 3)
    checked: list[str] = []
    check = convolutions.check_tensors

    def checking(name: str, *given: Any, **more: Any) -> None:
        checked.append(name)
        check(name, *given, **more)

    monkeypatch.setattr(convolutions, "check_tensors", checking)
    expected = sepconv.depthwise_conv2d(x.bfloat16(), weight.bfloat16(), None, 1, 1)
    checked.clear()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sepconv.depthwise_conv2d(x, weight, None, 1, 1), expected)
        with torch.autocast("cpu", torch.float16):
            assert sepconv.depthwise_conv2d(x, weight, None, 1, 1).dtype is torch.float16
        assert sepconv.depthwise_conv2d(x, weight, None, 1, 1).dtype is torch.float32
    assert len(checked) == 3


def test_another_layer_of_the_same_sizes_still_waits_for_its_norm() -> None:
    """What one replaced layer has learnt is not for a layer that nobody knows yet."""
    direct.forget()
    bare, other = (nn.Sequential(nn.Conv2d(64, 24, 1, bias=False)) for _ in range(2))
    sepconv.replace_layers(bare)
    sepconv.replace_layers(other)
    x, known = _image(), bare[0]
    for _ in range(3):
        bare(x)
    assert direct._calls[direct._key(known, x, known.weight)], "the bare layer goes to PyTorch at once"
    assert type(other[0](x)) is Pending
