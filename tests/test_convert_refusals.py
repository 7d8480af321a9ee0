"""What is not converted and why, and errors that come before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convertible import conv, convert, images, plain, trained
from torch import Tensor, nn

from sepconv.convert import conversion, fit


class Bad(nn.Module):
    """Every way in which a convolution must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.grouped = conv(6, 6, groups=2)
        self.depthwise = conv(6, 6, groups=6)
        self.point = nn.Conv2d(6, 6, 1)
        self.turned = nn.ConvTranspose2d(6, 6, 3, padding=1)
        self.idle = conv(6, 6)
        self.normed = nn.utils.parametrizations.weight_norm(conv(6, 6))
        self.hooked = conv(6, 6)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.tied = conv(6, 6)
        self.twin = conv(6, 6)
        self.twin.weight = self.tied.weight
        self.own = Own(6, 6, 3, padding=1)
        self.skipped = nn.Sequential(conv(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x) if layer is not self.idle else nn.functional.conv2d(x, layer.weight, padding=1)
        return x


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


REASONS = {
    "stem": "",
    "grouped": "grouped (groups=2)",
    "depthwise": "already depthwise",
    "point": "already pointwise (1x1)",
    "turned": "a transposed convolution",
    "idle": "its forward never ran on the images",
    "normed": "its weight is computed (_WeightNorm); torch.nn.utils.parametrize.remove_parametrizations(layer, "
    "'weight') makes it a plain one",
    "hooked": "it has hooks",
    "tied": "another module uses its weight",
    "twin": "another module uses its weight",
    "own": "Own has a forward of its own",
    "skipped.0": "skipped as asked",
}


def test_each_convolution_that_stays_has_its_reason() -> None:
    model = Bad().double()
    new, plan = convert(model, images(), depth_multiplier=9, skip=["skipped"])
    assert {row.name: row.reason for row in plan.layers} == REASONS
    assert [row.name for row in plan.converted] == ["stem"]
    torch.testing.assert_close(new(images()), model(images()))
    _, plan = convert(model, images(), depth_multiplier=9, skip=lambda name, module: name == "skipped.0")
    assert {row.name: row.reason for row in plan.layers} == REASONS


def test_a_layer_too_large_to_calibrate_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "LARGEST", 90)
    _, plan = convert(trained(plain), images(), depth_multiplier=1)
    assert [row.rank for row in plan.layers] == [1, 1, 0]
    assert plan.layers[2].reason == "too large to calibrate: 108 values in a patch, at most 90"
    _, plan = convert(trained(plain), images(), depth_multiplier=1, method="svd")
    assert [row.rank for row in plan.layers] == [1, 1, 1]


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no convolution to convert \(0: already pointwise \(1x1\)\)"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 1)), images(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"Linear has no convolution to convert \(it has no nn\.Conv1d/2d/3d at all"):
        convert(nn.Linear(13, 4), images(dtype=torch.float32))
    with pytest.raises(ValueError, match="0: no rank makes it cheaper"):
        convert(nn.Sequential(nn.Conv2d(3, 1, 3)), images(dtype=torch.float32))


def test_an_unreachable_budget_names_the_smallest() -> None:
    model = trained(plain)
    with pytest.raises(ValueError, match=r"budget 0\.05 of the convolutions' weights cannot be reached") as caught:
        convert(model, images(), 0.05)
    smallest = float(str(caught.value).split("smallest reachable is ")[1].split(" ")[0])
    _, plan = convert(model, images(), smallest)
    assert [row.rank for row in plan.layers] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, r"budget must be over 0 and at most 1, got 0"),
        ({"budget": -0.5}, r"budget must be over 0 and at most 1, got -0\.5"),
        ({"budget": 1.5}, r"budget must be over 0 and at most 1, got 1\.5"),
        ({"budget": float("nan")}, r"budget must be over 0 and at most 1, got nan"),
        ({"metric": "flops"}, r"metric must be one of conv_params, macs, latency, got 'flops'"),
        ({"method": "magic"}, r"method must be one of sequential, least_squares, svd, got 'magic'"),
        ({"depth_multiplier": 0}, r"depth_multiplier must be at least 1, got 0"),
        ({"calibration": None}, r"method='sequential' needs calibration images; without any, use method='svd'"),
        ({"calibration": None, "method": "svd", "metric": "macs"}, r"metric='macs' needs calibration images or an ex"),
        ({"skip": ["nowhere"]}, r"skip names 'nowhere', which is no module of Sequential"),
        ({"calibration": torch.zeros(0, 3, 8, 8)}, r"calibration holds no images"),
        ({"calibration": []}, r"calibration holds no images"),
        ({"calibration": torch.full((2, 3, 8, 8), float("nan"))}, r"calibration images hold NaN or infinity"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"convert: {message}"):
        convert(plain(), **{"calibration": images(dtype=torch.float32), **arguments})


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        convert("resnet18", images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"calibration must be a tensor or batches of tensors \(.*\), got str"):
        convert(plain(), ["image.png"])
    with pytest.raises(TypeError, match=r"calibration images must be floating point, got torch\.uint8"):
        convert(plain(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(self.conv.weight.dtype))


class HidesConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)
        self.hidden = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


def test_networks_that_need_the_normal_convolution_say_so() -> None:
    with pytest.raises(
        ValueError, match=r"\(conv: the model needs a normal convolution there \(AttributeError: .*'weight"
    ):
        convert(ReadsWeight().double(), images(), depth_multiplier=1)
    with pytest.raises(ValueError, match=r"\(conv: the model calls it by another way than its name\)"):
        convert(HidesConv().double(), images(), depth_multiplier=1)


@pytest.mark.parametrize("form", ["separable", "bottleneck"])
def test_the_layers_that_the_model_reads_stay_and_the_others_do_not(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before anything is fitted."""
    model = nn.Sequential(conv(3, 6), ReadsWeight().double(), HidesConv().double(), conv(6, 4)).double()
    model[1].conv = conv(6, 3).double()
    found = convert(model, images(), depth_multiplier=1, form=form, sweeps=1)[1]
    assert [row.rank > 0 for row in found.layers] == [True, False, False, True]
    assert all(type(model.get_submodule(row.name)) is nn.Conv2d for row in found.layers)
    monkeypatch.setattr(fit.Fit, "_seen", lambda *_: pytest.fail("fitted"))
    with pytest.raises(
        ValueError, match=r"cannot be reached; .* of it stays as it is: 1\.conv: the model needs a normal c"
    ):
        convert(model, images(), 0.1, form=form)


class Undifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"class": self.body(x).argmax(1)}


def test_outputs_without_gradient_fall_back_with_a_note() -> None:
    new, plan = convert(Undifferentiable().double(), images(), 0.5)
    assert "not differentiable" in plan.notes[0]
    assert plan.conv_params[1] <= 0.5 * plan.conv_params[0]
    assert new(images())["class"].shape == (40,)
