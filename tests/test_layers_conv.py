"""The layers: equal to PyTorch's modules, with their state_dict, through everything a module must survive."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sepconv

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DEPTHWISE = {1: sepconv.DepthwiseConv1d, 2: sepconv.DepthwiseConv2d, 3: sepconv.DepthwiseConv3d}
_POINTWISE = {1: sepconv.PointwiseConv1d, 2: sepconv.PointwiseConv2d, 3: sepconv.PointwiseConv3d}
_SEPARABLE = {1: sepconv.SeparableConv1d, 2: sepconv.SeparableConv2d, 3: sepconv.SeparableConv3d}
_dims = pytest.mark.parametrize("dims", [1, 2, 3])


def _image(dims: int, channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, *(9, 7, 5)[:dims])


@_dims
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_depthwise_equals_grouped_conv(dims: int, options: dict[str, Any]) -> None:
    conv = _CONV[dims](4, 8, 3, groups=4, **options)
    layer = _DEPTHWISE[dims](4, 3, depth_multiplier=2, **options)
    layer.load_state_dict(conv.state_dict())
    x = _image(dims)
    torch.testing.assert_close(layer(x), conv(x))
    shared = _DEPTHWISE[dims].from_conv(conv)
    assert shared.weight is conv.weight
    assert shared.depth_multiplier == 2
    torch.testing.assert_close(shared(x), conv(x))


@_dims
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"bias": False}], ids=str)
def test_pointwise_equals_conv(dims: int, options: dict[str, Any]) -> None:
    conv = _CONV[dims](4, 6, 1, **options)
    layer = _POINTWISE[dims](4, 6, **options)
    layer.load_state_dict(conv.state_dict())
    x = _image(dims)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(_POINTWISE[dims].from_conv(conv)(x), conv(x))


@_dims
@pytest.mark.parametrize("multiplier", [1, 3])
def test_separable_equals_its_two_convolutions(dims: int, multiplier: int) -> None:
    first = _CONV[dims](4, 4 * multiplier, 3, stride=2, padding=1, groups=4, bias=False)
    second = _CONV[dims](4 * multiplier, 6, 1)
    layer = _SEPARABLE[dims].from_conv(first, second)
    x = _image(dims)
    torch.testing.assert_close(layer(x), second(first(x)))
    other = _SEPARABLE[dims](4, 6, 3, stride=2, padding=1, depth_multiplier=multiplier, depthwise_bias=False)
    other.load_state_dict(
        {"depthwise.weight": first.weight, "pointwise.weight": second.weight, "pointwise.bias": second.bias}
    )
    torch.testing.assert_close(other(x), second(first(x)))
    assert (other.in_channels, other.out_channels) == (4, 6)


@_dims
def test_separable_with_norm_and_activation_is_a_mobilenet_block(dims: int) -> None:
    layer = _SEPARABLE[dims](4, 6, 3, padding=1, bias=False, norm="batch", activation="relu6")
    x = _image(dims)
    expected = nn.Sequential(
        layer.depthwise, layer.depthwise_norm, nn.ReLU6(), layer.pointwise, layer.pointwise_norm, nn.ReLU6()
    )
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(x), expected(x))
    keys = ["depthwise.weight", "depthwise_norm.weight", "depthwise_norm.bias", "pointwise.weight"]
    assert list(dict(layer.named_parameters())) == [*keys, "pointwise_norm.weight", "pointwise_norm.bias"]


def test_activation_module_and_name_agree() -> None:
    named = sepconv.SeparableConv2d(4, 6, 3, activation="silu")
    made = sepconv.SeparableConv2d(4, 6, 3, activation=nn.SiLU)
    made.load_state_dict(named.state_dict())
    x = _image(2)
    torch.testing.assert_close(named(x), made(x))
    assert sepconv.explain(named, x)[0].op == sepconv.explain(made, x)[0].op == "separable_conv"


@pytest.mark.parametrize("other", [nn.ELU(), nn.GELU(approximate="tanh"), None], ids=["elu", "tanh", "none"])
def test_another_activation_takes_the_place_of_the_first(other: nn.Module | None) -> None:
    layer = sepconv.SeparableConv2d(4, 6, 3, activation="relu")
    layer.activation = other
    x, active = _image(2), other or nn.Identity()
    torch.testing.assert_close(layer(x), active(layer.pointwise(active(layer.depthwise(x)))))


def test_stacked_pointwise_layers() -> None:
    layer = sepconv.SeparableConv2d(4, 6, 3, activation="relu", norm=lambda c: nn.GroupNorm(2, c), pointwise_layers=3)
    x = _image(2)
    y = layer.activation(layer.depthwise_norm(layer.depthwise(x)))
    for conv, norm in (
        (layer.pointwise, layer.pointwise_norm),
        (layer.pointwise2, layer.pointwise2_norm),
        (layer.pointwise3, layer.pointwise3_norm),
    ):
        y = layer.activation(norm(conv(y)))
    torch.testing.assert_close(layer(x), y)
    plain = sepconv.SeparableConv2d(4, 6, 3, pointwise_layers=2)
    torch.testing.assert_close(plain(x), plain.pointwise2(plain.pointwise(plain.depthwise(x))))


def test_hooks_on_the_parts_are_called() -> None:
    layer, seen = sepconv.SeparableConv2d(4, 6, 3), []
    layer.depthwise.register_forward_hook(lambda *_: seen.append("depthwise"))
    layer.pointwise.register_forward_hook(lambda *_: seen.append("pointwise"))
    layer(_image(2))
    assert seen == ["depthwise", "pointwise"]


def test_replaced_part_is_used() -> None:
    layer = sepconv.SeparableConv2d(4, 6, 3)
    layer.pointwise = nn.Identity()
    x = _image(2)
    torch.testing.assert_close(layer(x), layer.depthwise(x))


def _through_state_dict(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = sepconv.SeparableConv2d(4, 6, 3, activation="relu6", device="meta").to_empty(device="cpu")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "travel",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_state_dict],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_layer_survives(travel: Callable[[nn.Module], nn.Module]) -> None:
    layer = sepconv.SeparableConv2d(4, 6, 3, activation="relu6")
    x = _image(2)
    torch.testing.assert_close(travel(layer)(x), layer(x), rtol=0, atol=0)


def test_meta_device_and_dtype() -> None:
    layer = sepconv.SeparableConv2d(4, 6, 3, norm="batch", device="meta", dtype=torch.float64)
    assert layer(torch.empty(2, 4, 9, 9, device="meta", dtype=torch.float64)).shape == (2, 6, 7, 7)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


def test_training_changes_every_parameter() -> None:
    model = nn.Sequential(
        sepconv.SeparableConv2d(3, 8, 3, padding=1, bias=False, norm="batch", activation="relu6"),
        sepconv.SeparableConv2d(8, 4, 3, depth_multiplier=2),
    )
    before = copy.deepcopy(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 9, 9)).square().mean().backward()
    optimizer.step()
    assert all(bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "DepthwiseConv2d: in_channels must be a positive integer, got 0",
            lambda: sepconv.DepthwiseConv2d(0, 3),
        ),
        (ValueError, "depth_multiplier must be a positive", lambda: sepconv.DepthwiseConv2d(4, 3, depth_multiplier=0)),
        (ValueError, "kernel_size must be at least 1", lambda: sepconv.DepthwiseConv2d(4, 0)),
        (ValueError, "kernel_size must be an integer or 2", lambda: sepconv.DepthwiseConv2d(4, (3, 3, 3))),
        (ValueError, "padding_mode must be one of zeros", lambda: sepconv.DepthwiseConv2d(4, 3, padding_mode="mirror")),
        (ValueError, "PointwiseConv2d: out_channels must be", lambda: sepconv.PointwiseConv2d(4, -1)),
        (
            ValueError,
            "SeparableConv2d: pointwise_layers must",
            lambda: sepconv.SeparableConv2d(4, 4, 3, pointwise_layers=0),
        ),
        (ValueError, "norm must be None, 'batch' or", lambda: sepconv.SeparableConv2d(4, 4, 3, norm="layer")),
        (
            ValueError,
            "activation must be None, a callable",
            lambda: sepconv.SeparableConv2d(4, 4, 3, activation="selu"),
        ),
        (TypeError, "needs an nn.Conv2d, got Conv1d", lambda: sepconv.DepthwiseConv2d.from_conv(nn.Conv1d(4, 4, 3))),
        (ValueError, "has groups == in_channels", lambda: sepconv.DepthwiseConv2d.from_conv(nn.Conv2d(4, 4, 3))),
        (ValueError, "kernel_size 1, groups 1 and", lambda: sepconv.PointwiseConv2d.from_conv(nn.Conv2d(4, 4, 3))),
        (
            ValueError,
            "has 4 output channels but the pointwise one has in_channels=5",
            lambda: sepconv.SeparableConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(5, 4, 1)),
        ),
        (
            ValueError,
            "the pointwise stride must be 1",
            lambda: sepconv.SeparableConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, stride=2)),
        ),
    ],
)
def test_wrong_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()
