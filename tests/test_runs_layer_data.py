"""What is kept of two networks, computed again from the stored numbers and compared with the networks themselves."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import sample_run
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv import PointwiseConv2d, SeparableConv2d
from sepconv.runs import layer_data, layer_pairs

SIZE = 13


def floats(text: str, *shape: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(text), "<f4").copy()
    return torch.from_numpy(values).view(*shape)


def window_of(stored: dict, maps: Tensor) -> Tensor:
    top, left, height, width = (stored["window"][key] for key in ("top", "left", "height", "width"))
    return maps[0, stored["channels"], top : top + height, left : left + width]


def stored_input(stored: dict) -> Tensor:
    (kh, kw), (sh, sw), (dh, dw) = stored["kernel"], stored["stride"], stored["dilation"]
    height = (stored["window"]["height"] - 1) * sh + dh * (kh - 1) + 1
    width = (stored["window"]["width"] - 1) * sw + dw * (kw - 1) + 1
    return floats(stored["input"], 1, stored["in_channels"], height, width)


def normal_map(stored: dict) -> Tensor:
    kept, c, kernel = len(stored["channels"]), stored["in_channels"], stored["kernel"]
    weight, bias = floats(stored["normal_weight"], kept, c, *kernel), floats(stored["normal_bias"], kept)
    x = stored_input(stored)
    return F.conv2d(x, weight, bias, stored["stride"], dilation=stored["dilation"])[0]


def separable_map(stored: dict, activation=lambda z: z) -> Tensor:
    kept, c = len(stored["channels"]), stored["in_channels"]
    x = stored_input(stored)
    if stored["reduce_weight"]:
        reduce = floats(stored["reduce_weight"], -1, c, 1, 1)
        x, c = F.conv2d(x, reduce), len(reduce)
    hidden = c * stored["depth_multiplier"]
    depthwise = floats(stored["depthwise_weight"], hidden, 1, *stored["kernel"])
    z = F.conv2d(
        x,
        depthwise,
        floats(stored["depthwise_bias"], hidden),
        stored["stride"],
        dilation=stored["dilation"],
        groups=c,
    )
    pointwise = floats(stored["pointwise_weight"], kept, hidden, 1, 1)
    return F.conv2d(activation(z), pointwise, floats(stored["pointwise_bias"], kept))[0]


def warmed(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights of their own, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


GEOMETRIES = {
    "plain": {"padding": 1},
    "stride_2_no_padding": {"stride": 2},
    "dilation_2_same": {"padding": "same", "dilation": 2},
    "reflected": {"padding": 2, "padding_mode": "reflect", "stride": (1, 2)},
    "no_bias": {"padding": 1, "bias": False},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("norm", ["none", "affine", "plain"])
def test_stored_numbers_give_what_both_layers_compute(geometry, norm):
    after = {"none": nn.Identity(), "affine": nn.BatchNorm2d(7), "plain": nn.BatchNorm2d(7, affine=False)}[norm]
    normal = warmed(nn.Sequential(nn.Conv2d(5, 7, 3, **geometry), after, nn.ReLU(inplace=True)))
    layer = SeparableConv2d(5, 7, 3, **geometry, depth_multiplier=2)
    separable = nn.Sequential(layer, warmed(nn.BatchNorm2d(7))).eval()
    image = torch.randn(5, SIZE, SIZE + 2)
    stored = layer_data.collect(normal, separable, image)["layers"][0]
    with torch.no_grad():
        torch.testing.assert_close(normal_map(stored), window_of(stored, normal[:2](image[None])), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            separable_map(stored), window_of(stored, separable(image[None])), rtol=1e-4, atol=1e-5
        )
    assert stored["batch_norm"] is (norm != "none")
    assert stored["depth_multiplier"] == 2


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_stored_numbers_give_what_a_bottleneck_computes(geometry):
    normal = nn.Sequential(nn.Conv2d(5, 7, 3, **geometry))
    bottleneck = nn.Sequential(PointwiseConv2d(5, 4, bias=False), SeparableConv2d(4, 7, 3, **geometry))
    separable = nn.Sequential(bottleneck, warmed(nn.BatchNorm2d(7))).eval()
    image = torch.randn(5, SIZE, SIZE + 2)
    found = layer_data.collect(normal, separable, image)
    assert found["left_out"] == []
    stored = found["layers"][0]
    assert len(floats(stored["reduce_weight"], -1)) == 4 * 5
    with torch.no_grad():
        torch.testing.assert_close(
            separable_map(stored), window_of(stored, separable(image[None])), rtol=1e-4, atol=1e-5
        )


BETWEEN = {
    "bias": PointwiseConv2d(3, 3),
    "stride": nn.Conv2d(3, 3, 1, stride=2, bias=False),
    "padding": nn.Conv2d(3, 3, 1, padding=1, bias=False),
    "groups": nn.Conv2d(3, 3, 1, groups=3, bias=False),
    "size": nn.Conv2d(3, 3, 3, bias=False),
    "no_convolution": nn.ReLU(),
}


@pytest.mark.parametrize("first", BETWEEN.values(), ids=BETWEEN)
def test_other_modules_in_a_row_are_left_out(first):
    normal = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    separable = nn.Sequential(nn.Sequential(first, SeparableConv2d(3, 3, 3, padding=1)))
    found = layer_data.collect(normal, separable, torch.randn(3, SIZE, SIZE))
    assert found["layers"] == []
    assert found["left_out"] == [{"name": "0", "reason": "it became 2 modules in a row that the page does not know"}]


def test_bottlenecks_that_are_too_large_or_of_other_channels_are_left_out(monkeypatch):
    normal = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3))
    layers = (nn.Sequential(PointwiseConv2d(3, r, bias=False), SeparableConv2d(r, o, 3)) for r, o in ((7, 3), (6, 4)))
    separable = nn.Sequential(*layers)
    monkeypatch.setattr(layer_pairs, "REDUCE_VALUES", 20)
    found = layer_data.collect(normal, separable, torch.randn(3, SIZE, SIZE))
    assert [layer["name"] for layer in found["layers"]] == ["1"]
    reason = "the first convolution of its bottleneck has 21 weights, too many for a page"
    assert found["left_out"] == [{"name": "0", "reason": reason}]
    other = nn.Sequential(nn.Sequential(PointwiseConv2d(2, 3, bias=False), SeparableConv2d(3, 3, 3)))
    assert layer_pairs._cannot_be_followed(normal[0], other[0]) == "its separable form has another geometry"


@pytest.mark.parametrize("name", ["relu", "relu6", "silu", "hardswish", "gelu", "sigmoid"])
def test_activation_and_norm_between_are_kept(name):
    normal = nn.Sequential(nn.Conv2d(3, 4, 3))
    separable = warmed(nn.Sequential(SeparableConv2d(3, 4, 3, norm="batch", activation=name)))
    image = torch.randn(3, SIZE, SIZE)
    stored = layer_data.collect(normal, separable, image)["layers"][0]
    assert stored["activation"] == name
    layer = separable[0]
    with torch.no_grad():
        hidden = layer.activation(layer.depthwise_norm(layer.depthwise(image[None])))
        truth = layer.pointwise_norm(layer.pointwise(hidden))
    torch.testing.assert_close(separable_map(stored, getattr(F, name)), window_of(stored, truth), rtol=1e-4, atol=1e-5)


class NotRun(nn.Sequential):
    """Calls all but its last layer."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def test_layers_that_the_page_cannot_follow_are_left_out_with_the_reason():
    normal = NotRun(*(nn.Conv2d(3, 3, size, groups=g) for size, g in ((3, 1), (3, 1), (3, 3), (3, 1), (1, 1), (3, 1))))
    normal.extend([nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)])
    separable = NotRun(
        SeparableConv2d(3, 3, 3, activation=nn.Tanh),
        SeparableConv2d(3, 3, 3, pointwise_layers=2),
        SeparableConv2d(3, 3, 3),
        SeparableConv2d(3, 3, 3),
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 3),
        SeparableConv2d(3, 3, 3, dilation=2),
        SeparableConv2d(3, 3, 3),
    )
    found = layer_data.collect(normal, separable, torch.randn(3, 2 * SIZE, 2 * SIZE))
    assert [layer["name"] for layer in found["layers"]] == ["3"]
    assert {row["name"]: row["reason"] for row in found["left_out"]} == {
        "0": "the page cannot compute the Tanh inside it",
        "1": "it has 2 pointwise convolutions in a row; the page follows one",
        "2": "it has 3 groups",
        "4": "it is pointwise already",
        "5": "it stayed a normal convolution",
        "6": "its separable form has another geometry",
        "7": "it did not run on this image",
    }


def test_input_is_kept_before_an_activation_in_place_changes_it():
    class InPlaceLater(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + x.mul_(0)[:, :, 2:, 2:]

    normal, separable = InPlaceLater(nn.Conv2d(3, 3, 3)), InPlaceLater(SeparableConv2d(3, 3, 3))
    image = torch.randn(3, SIZE, SIZE)
    stored = layer_data.collect(normal, separable, image.clone())["layers"][0]
    torch.testing.assert_close(stored_input(stored)[0], image)


def test_layers_called_by_keyword_and_an_image_that_is_changed_in_place():
    class Named(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv, self.norm = conv, nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(input=self.conv(input=x.clamp_(min=0)))

    normal, separable = Named(nn.Conv2d(2, 4, 3)), Named(SeparableConv2d(2, 4, 3))
    image = torch.randn(2, SIZE, SIZE)
    kept = image.clone()
    (stored,) = layer_data.collect(normal, separable, image)["layers"]
    assert stored["batch_norm"]
    assert torch.equal(image, kept)
    assert torch.equal(stored_input(stored)[0], image.clamp(min=0))


def test_models_are_left_as_they_were():
    normal = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    separable = nn.Sequential(SeparableConv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    separable[1].eval()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (normal, separable)]
    layer_data.collect(normal, separable, torch.randn(3, SIZE, SIZE))
    assert [module.training for module in normal.modules()] == [True] * 3
    assert separable.training
    assert not separable[1].training
    for model, state in zip((normal, separable), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_shared_layer_is_shown_once_as_first_called():
    conv, layer = nn.Conv2d(3, 3, 3, padding=1), SeparableConv2d(3, 3, 3, padding=1)
    image = torch.randn(3, SIZE, SIZE)
    found = layer_data.collect(nn.Sequential(conv, nn.ReLU(), conv), nn.Sequential(layer, nn.ReLU(), layer), image)
    assert [stored["name"] for stored in found["layers"]] == ["0"]
    torch.testing.assert_close(stored_input(found["layers"][0])[0, :, 1:-1, 1:-1], image)


def test_a_large_layer_is_cut_to_a_window_in_the_middle():
    normal = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, stride=2))
    separable = nn.Sequential(SeparableConv2d(16, 8, 3, padding=1, stride=2))
    image = torch.randn(16, 257, 193)
    stored = layer_data.collect(normal, separable, image)["layers"][0]
    window = stored["window"]
    assert stored["output_size"] == [129, 97]
    assert 20 < window["height"] < 97
    assert abs(2 * window["top"] + window["height"] - 129) <= 1
    assert abs(2 * window["left"] + window["width"] - 97) <= 1
    assert sum(len(stored[key]) for key in stored if isinstance(stored[key], str)) < 4 / 3 * 4 * 1.01 * (
        layer_data.VALUES_PER_LAYER
    )
    with torch.no_grad():
        torch.testing.assert_close(normal_map(stored), window_of(stored, normal(image[None])), rtol=1e-4, atol=1e-5)


def test_the_channels_kept_are_those_that_vary_most():
    normal, separable = nn.Sequential(nn.Conv2d(2, 9, 3)), nn.Sequential(SeparableConv2d(2, 9, 3))
    with torch.no_grad():
        normal[0].weight[[1, 4, 8]] *= 100
    stored = layer_data.collect(normal, separable, torch.randn(2, SIZE, SIZE), channels=3)["layers"][0]
    assert stored["channels"] == [1, 4, 8]


@pytest.mark.parametrize(("count", "expected"), [(1, ["0"]), (2, ["0", "4"]), (3, ["0", "2", "4"]), (9, list("01234"))])
def test_layers_are_chosen_evenly(count, expected):
    normal = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(5)))
    separable = nn.Sequential(*(SeparableConv2d(2, 2, 1) for _ in range(5)))
    found = layer_data.collect(normal, separable, torch.randn(2, SIZE, SIZE), max_layers=count)
    assert [layer["name"] for layer in found["layers"]] == expected
    others = [row["name"] for row in found["left_out"]]
    assert others == [name for name in "01234" if name not in expected]
    assert {row["reason"] for row in found["left_out"]} <= {f"one of {len(others)} more of the same kind"}


def test_named_layers_only():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    converted = sample_run.separated(model, 1)
    found = layer_data.collect(model, converted, torch.randn(2, SIZE, SIZE), layers=["1"], label="seven")
    assert [layer["name"] for layer in found["layers"]] == ["1"]
    assert found["image"]["label"] == "seven"
    with pytest.raises(
        ValueError, match=r"^collect: layer 'x' is not a converted layer; those that can be shown: 0, 1$"
    ):
        layer_data.collect(model, converted, torch.randn(2, SIZE, SIZE), layers=["x"])


def test_image_of_another_shape():
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"^collect: image must have shape .*, got \(2, 2, 9, 9\)$"):
        layer_data.collect(model, sample_run.separated(model, 1), torch.randn(2, 2, 9, 9))


def test_result_is_json_without_numbers_that_are_not_finite():
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    found = layer_data.collect(model, sample_run.separated(model, 1), torch.randn(2, 9, 9))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
