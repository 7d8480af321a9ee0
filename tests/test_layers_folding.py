"""Batch norms in evaluation are folded into the convolutions before them, and never stale or unasked."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.kernels.halide.jit import packing
from sepconv.models.mobilenet_v2 import InvertedResidual

_LAYER: dict[int, Any] = {1: sepconv.SeparableConv1d, 2: sepconv.SeparableConv2d, 3: sepconv.SeparableConv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _lively(model: nn.Module) -> nn.Module:
    """Norms with statistics and weights that show when they are left out."""
    for norm in model.modules():
        if isinstance(norm, tuple(_NORMS.values())):
            for values in (norm.running_mean, norm.bias):
                if values is not None:
                    nn.init.normal_(values)
            for values in (norm.running_var, norm.weight):
                if values is not None:
                    nn.init.uniform_(values, 0.5, 2.0)
    return model.eval()


def _by_parts(layer: Any, x: Tensor) -> Tensor:
    """The truth: one module after the other, in float64."""
    stages = [("depthwise", "depthwise_norm"), ("pointwise", "pointwise_norm")]
    stages += [(f"pointwise{i}", f"pointwise{i}_norm") for i in range(2, layer.pointwise_layers + 1)]
    kept = layer.double()
    y = x.double()
    with torch.no_grad():
        for stage in stages:
            for name in (*stage, "activation"):
                part = getattr(kept, name)
                y = y if part is None else part(y)
    layer.float()
    return y


def _operations(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad():
        return [choice.op for choice in sepconv.explain(model, x)]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu6", "bias": False},
        {"activation": nn.SiLU, "stride": 2, "depth_multiplier": 2},
        {"activation": None, "pointwise_layers": 3},
        {"plain": True, "activation": "gelu"},
    ],
    ids=["mobilenet", "silu", "stacked", "no scale"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_result_is_that_of_the_parts(dims: int, options: dict[str, Any], channels_last: bool) -> None:
    options = dict(options)
    plain = options.pop("plain", False)
    layer: Any = _lively(
        _LAYER[dims](5, 7, 3, padding=1, norm=lambda c: _NORMS[dims](c, eps=1e-2, affine=not plain), **options)
    )
    x = torch.randn(2, 5, *(11, 9, 7)[:dims])
    if channels_last and dims > 1:
        x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    truth = _by_parts(layer, x)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    more = options.get("pointwise_layers", 1) - 1
    operations = _operations(layer, x)
    assert operations[0] == "separable_conv"
    assert operations[len(operations) - more :] == ["pointwise_conv"] * more


def _layer() -> Any:
    return _lively(sepconv.SeparableConv2d(8, 16, 3, padding=1, norm="batch", activation="relu"))


def _image() -> Tensor:
    return torch.randn(2, 8, 9, 11).contiguous(memory_format=torch.channels_last)


_TENSORS = [
    *("depthwise.weight", "depthwise.bias", "pointwise.weight", "pointwise.bias"),
    *(f"{norm}_norm.{name}" for norm in ("depthwise", "pointwise") for name in ("weight", "bias")),
    *(f"{norm}_norm.running_{name}" for norm in ("depthwise", "pointwise") for name in ("mean", "var")),
]


@pytest.mark.parametrize("name", _TENSORS)
@pytest.mark.parametrize("how", ["in place", "data", "state_dict"])
def test_a_changed_number_is_seen(name: str, how: str) -> None:
    layer, x = _layer(), _image()
    with torch.no_grad():
        before = layer(x)
        tensor = layer.state_dict()[name]
        if how == "in place":
            tensor[-1] += 0.25
        elif how == "data":
            tensor.data[-1] += 0.25
        else:
            layer.load_state_dict({**layer.state_dict(), name: tensor + 0.25})
        after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.double(), _by_parts(layer, x), rtol=1e-5, atol=1e-5)


def test_another_epsilon_is_seen() -> None:
    layer, x = _layer(), _image()
    with torch.no_grad():
        layer(x)
        layer.pointwise_norm.eps = 0.5
        torch.testing.assert_close(layer(x).double(), _by_parts(layer, x), rtol=1e-5, atol=1e-5)


def test_the_same_numbers_in_another_shape_are_another_weight() -> None:
    square, x = _layer(), _image()
    column: Any = _lively(sepconv.SeparableConv2d(8, 16, (9, 1), padding=(4, 0), norm="batch", activation="relu"))
    for name in ("depthwise_norm", "pointwise", "pointwise_norm"):
        setattr(column, name, getattr(square, name))
    column.depthwise.bias = square.depthwise.bias
    column.depthwise.weight = nn.Parameter(square.depthwise.weight.data.view(8, 1, 9, 1))
    with torch.no_grad():
        results = [(layer, layer(x)) for layer in (square, column, square)]
    for layer, y in results:
        torch.testing.assert_close(y.double(), _by_parts(copy.deepcopy(layer), x), rtol=1e-5, atol=1e-5)


class _OwnNorm(nn.BatchNorm2d):
    pass


def _with(change: Callable[[Any], object]) -> Callable[[], Any]:
    def make() -> Any:
        layer = _layer()
        change(layer)
        return layer

    return make


@pytest.mark.parametrize(
    "make",
    [
        _with(lambda layer: layer.depthwise_norm.train()),
        _with(lambda layer: setattr(layer, "pointwise_norm", _OwnNorm(16).eval())),
        _with(lambda layer: setattr(layer, "pointwise_norm", nn.GroupNorm(2, 16))),
        _with(lambda layer: setattr(layer, "depthwise_norm", nn.BatchNorm2d(8, track_running_stats=False).eval())),
        _with(lambda layer: setattr(layer, "activation", nn.SELU())),
        _with(lambda layer: layer.pointwise_norm.register_forward_hook(lambda *_: None)),
        _with(lambda layer: layer.activation.register_forward_pre_hook(lambda *_: None)),
    ],
    ids=["training", "own norm", "group norm", "batch statistics", "own activation", "hook", "pre-hook"],
)
def test_what_does_more_than_scale_and_shift_runs_by_itself(make: Callable[[], Any]) -> None:
    layer, x = make(), _image()
    assert _operations(layer, x) == ["depthwise_conv", "pointwise_conv"]


class _Own(Tensor):
    pass


_UNUSUAL: dict[str, Callable[[Any, Any], object]] = {
    "double variance": lambda conv, norm: setattr(norm, "running_var", norm.running_var.double()),
    "half bias": lambda conv, norm: setattr(norm, "bias", nn.Parameter(norm.bias.half())),
    "double bias of the convolution": lambda conv, norm: setattr(conv, "bias", nn.Parameter(conv.bias.double())),
    "no variance": lambda conv, norm: setattr(norm, "running_var", None),
    "one channel": lambda conv, norm: norm.__init__(1),
    "another device": lambda conv, norm: setattr(norm, "bias", nn.Parameter(norm.bias.to("meta"))),
    "tensors of one's own": lambda conv, norm: setattr(norm, "running_mean", torch.randn(16).as_subclass(_Own)),
}


@pytest.mark.parametrize("change", _UNUSUAL)
def test_what_pytorch_says_of_unusual_tensors_is_what_the_layer_says(change: str) -> None:
    layer, x = _layer(), _image()
    _UNUSUAL[change](layer.pointwise, layer.pointwise_norm.eval())
    layer.eval()
    watched = _with(lambda other: other.activation.register_forward_hook(lambda *_: None))()
    for name in ("depthwise", "depthwise_norm", "pointwise", "pointwise_norm"):
        setattr(watched, name, getattr(layer, name))
    outcomes = []
    for call in (layer, watched):
        try:
            with torch.no_grad():
                outcomes.append(call(x).tolist())
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]


def test_with_gradients_nothing_is_folded() -> None:
    """The norms' own gradients need what is before them: they become part of the next pass instead."""
    layer, x = _layer(), _image()
    assert "separable_conv" not in [choice.op for choice in sepconv.explain(layer, x)]
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_hooks_of_all_modules_see_every_part() -> None:
    layer, seen = _layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            layer(_image())
    finally:
        handle.remove()
    assert seen.count("BatchNorm2d") == 2


def test_under_autocast_the_parts_run() -> None:
    layer, x = _layer(), _image()
    with torch.autocast("cpu", torch.bfloat16):
        assert _operations(layer, x) == ["depthwise_conv", "pointwise_conv"]


def test_an_exported_layer_keeps_its_norms() -> None:
    layer, x = _layer(), _image()
    with torch.no_grad():
        graph = torch.export.export(layer, (x,)).graph
    assert sum("batch_norm" in str(node.target) for node in graph.nodes) == 2


def test_folded_weights_go_with_the_layer() -> None:
    layer, x = _layer(), _image()
    gc.collect()
    before = packing.cached_weights()
    with torch.no_grad():
        layer(x)
    assert packing.cached_weights() > before
    del layer
    gc.collect()
    assert packing.cached_weights() == before


@pytest.mark.parametrize(("stride", "expansion", "outputs"), [(1, 6, 8), (2, 6, 12), (1, 1, 8)])
def test_an_inverted_residual_is_two_kernels(stride: int, expansion: int, outputs: int) -> None:
    block, x = _lively(InvertedResidual(8, outputs, stride, expansion)), _image()
    with torch.no_grad():
        y = block(x)
    truth = block.double().conv(x.double()) + (x if block.use_shortcut else 0)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    block.float()
    expected = ["separable_conv"] if expansion == 1 else ["pointwise_conv", "separable_conv"]
    assert _operations(block, x)[: len(expected)] == expected
    block.conv[-1].train()
    assert "separable_conv" not in _operations(block, x)


@pytest.mark.parametrize("activation", [nn.SELU(), nn.Identity(), nn.SiLU()], ids=["selu", "none", "silu"])
def test_changed_blocks_run_as_they_are(activation: nn.Module) -> None:
    block, x = _lively(InvertedResidual(8, 8, 1, 6)), _image()
    block.conv[1][2] = activation
    with torch.no_grad():
        torch.testing.assert_close(block(x), x + block.conv(x))
    assert ("separable_conv" in _operations(block, x)) == (type(activation) is not nn.SELU)


def test_hooks_of_a_block_and_of_what_holds_its_parts_are_called() -> None:
    block, x = _lively(InvertedResidual(8, 8, 1, 6)), _image()
    for watched in (block.conv, block.conv[0], block.conv[1][2]):
        seen: list[nn.Module] = []
        handle = watched.register_forward_hook(lambda module, args, output, seen=seen: seen.append(module))
        with torch.no_grad():
            block(x)
        handle.remove()
        assert seen == [watched]


def test_a_module_that_stands_twice_in_a_block_runs_twice() -> None:
    block, x = _lively(InvertedResidual(8, 8, 1, 1)), _image()
    block.conv = nn.Sequential(block.conv[0][0], nn.SiLU(), block.conv[0][0], block.conv[1])
    with torch.no_grad():
        torch.testing.assert_close(block(x), x + block.conv(x))
    assert "separable_conv" in _operations(block, x)
    block.conv.insert(1, nn.BatchNorm2d(8))
    block.conv.insert(1, nn.ReLU())  # in front of the norm: no stage
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), x + block.conv(x))
    assert "separable_conv" not in _operations(block, x)


def test_weights_of_another_kind_are_refused_as_ever() -> None:
    layer, x = _layer().double(), _image()
    with torch.no_grad(), pytest.raises(TypeError, match="float64"):
        layer(x)


def test_a_replaced_pointwise_layer_is_used() -> None:
    layer, x = sepconv.SeparableConv2d(8, 16, 3, pointwise_layers=2), _image()
    layer.pointwise2 = nn.Identity()
    torch.testing.assert_close(layer(x), layer.pointwise(layer.depthwise(x)))
