"""Models by name: built-in, the user's own and timm's; settings that do not fit are named in one line."""

from __future__ import annotations

import sys
import types
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import classes_of, images_for
from torch import nn

from sepconv.models import (
    BUILT_IN,
    MobileNetV1,
    MobileNetV1Normal,
    MobileNetV2,
    QuickNet,
    ResNet,
    VGGSmall,
    create,
)


@pytest.mark.parametrize("name", BUILT_IN)
def test_create_builds_every_name(name: str) -> None:
    model = create(name, num_classes=7, width_mult=0.5, in_channels=1)
    assert classes_of(model) == 7
    assert images_for(model).shape[1] == 1
    if name.removeprefix("resnet").isdecimal():
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(convs) + 1 == int(name.removeprefix("resnet"))


def _factory(depth: int, width: float = 1.0) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(1, round(width), 1) for _ in range(depth)))


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_networks")
    module.factory, module.number, module.wrong = _factory, 3, lambda: "no module"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", module)


@pytest.mark.usefixtures("own_module")
def test_create_calls_a_function_of_the_user() -> None:
    assert len(create("own_networks:factory", depth=3)) == 3
    assert isinstance(create("torch.nn:Linear", in_features=2, out_features=1), nn.Linear)
    with pytest.raises(TypeError, match=r"create: own_networks:wrong must return a torch\.nn\.Module, got str"):
        create("own_networks:wrong")


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mobilenet_v3",
            {},
            r"create: unknown model 'mobilenet_v3' \(did you mean mobilenet_v2 or mobilenet_v1.*\); known are "
            r"mobilenet_v1, .*resnet110, and the forms timm/NAME, torchvision/NAME and package\.module:function",
        ),
        ("", {}, r"create: unknown model ''; known are mobilenet_v1"),
        (
            "mobilenet_v2",
            {"widht_mult": 1},
            r"create: mobilenet_v2 has no setting 'widht_mult' \(did you mean width_mult\?\); its settings are "
            "width_mult, num_classes, in_channels, small_images, dropout, round_nearest",
        ),
        (
            "resnet20",
            {"depth": 8},
            "create: resnet20 has no setting 'depth'.*; its settings are width_mult, num_classes",
        ),
        (
            "own_networks:factory",
            {"deep": 1},
            r"create: own_networks:factory has no setting 'deep' \(did you mean depth",
        ),
        ("own_networks:factory", {}, "create: own_networks:factory needs the settings depth"),
        ("own_networks:factorie", {}, r"create: 'factorie' does not exist in own_networks \(did you mean factory\?\)"),
        ("own_networks:number", {}, "create: 'number' is not callable in own_networks"),
        (
            "no_such_package.x:f",
            {},
            r"create: cannot import 'no_such_package.x' of .* \(ModuleNotFoundError: No module",
        ),
        (":f", {}, "create: cannot import '' of ':f'"),
    ],
)
def test_create_refuses(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MobileNetV1(0), "MobileNetV1: width_mult must be a positive number, got 0"),
        (lambda: MobileNetV1Normal("wide"), "MobileNetV1Normal: width_mult must be a positive number, got 'wide'"),
        (lambda: MobileNetV2(float("nan")), "MobileNetV2: width_mult must be a positive number, got nan"),
        (lambda: MobileNetV2(round_nearest=0), "MobileNetV2: round_nearest must be a positive integer, got 0"),
        (lambda: VGGSmall(num_classes=0), "VGGSmall: num_classes must be a positive integer, got 0"),
        (lambda: VGGSmall(in_channels=True), "VGGSmall: in_channels must be a positive integer, got True"),
        (lambda: ResNet(dropout=1), "ResNet: dropout must be at least 0 and below 1, got 1"),
        (lambda: ResNet(18), r"ResNet: depth must be 6n\+2 with n at least 1 \(8, 14, 20, \.\.\.\), got 18"),
        (lambda: ResNet(2), "ResNet: depth must be"),
        (lambda: ResNet(shortcut="C"), "ResNet: shortcut must be 'identity' or 'projection', got 'C'"),
        (
            lambda: VGGSmall()(torch.ones(1, 3, 9, 7)),
            r"VGGSmall: images must have at least 8x8 pixels, got \(1, 3, 9, 7\)",
        ),
        (lambda: QuickNet(width_mult=0), "QuickNet: width_mult must be a positive number, got 0"),
        (lambda: QuickNet(activation="relu6"), "QuickNet: activation must be one of relu, gelu, silu, got 'relu6'"),
        (
            lambda: QuickNet()(torch.ones(1, 3, 8, 9)),
            r"QuickNet: images must have at least 9x9 pixels, got \(1, 3, 8, 9\)",
        ),
    ],
)
def test_settings_that_do_not_fit(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("depth"), r"create: own_networks:fails cannot be built with {} \(KeyError: 'depth'\)"),
        (SystemExit(2), r"create: own_networks:fails cannot be built with {} \(SystemExit: 2\)"),
        (AssertionError(), r"create: own_networks:fails cannot be built with {} \(AssertionError\)"),
        (RuntimeError("no\nway"), r"create: own_networks:fails cannot be built with {} \(no\)"),
        (ValueError("in its own words"), r"^in its own words$"),
    ],
)
def test_what_a_function_of_the_user_raises(
    error: BaseException, message: str, own_module: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> nn.Module:
        raise error

    monkeypatch.setattr(sys.modules["own_networks"], "fails", fails, raising=False)
    with pytest.raises(ValueError, match=message):
        create("own_networks:fails")


def test_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_me.py").write_text("from torch import nn\nimport also_beside_me\nnet = nn.Identity\n")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"cannot import 'beside_me' .*No module named 'also_beside_me'"):
        create("beside_me:net")
    (tmp_path / "also_beside_me.py").touch()
    assert isinstance(create("beside_me:net"), nn.Identity)
    assert sys.path[-1] == str(tmp_path)
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit(2)")
    with pytest.raises(ValueError, match=r"cannot import 'a_script' of 'a_script:net' \(SystemExit: 2\)"):
        create("a_script:net")
    (tmp_path / "torch.py").write_text("raise AssertionError")
    assert isinstance(create("torch.nn:Identity"), nn.Identity)


def test_timm_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"create: timm/resnet18 needs the package timm \(pip install timm\)"):
        create("timm/resnet18")


def test_timm_through_its_two_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm itself brings torchvision; what is used of it is list_models() and create_model(name, **settings)."""

    def create_model(name: str, **settings: Any) -> nn.Module:
        if "tag" in name and name != "mobilenetv1_100.tag":
            raise RuntimeError(f"Invalid pretrained tag in {name}")
        return _factory(**settings)

    timm = types.SimpleNamespace(list_models=lambda: ["resnet18", "mobilenetv1_100"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert len(create("timm/mobilenetv1_100.tag", depth=2)) == 2
    with pytest.raises(ValueError, match=r"create: timm has no model 'resnet81' \(did you mean resnet18\?\)"):
        create("timm/resnet81")
    with pytest.raises(ValueError, match=r"create: timm cannot build resnet18 with {'heads': 1}: .*'heads'"):
        create("timm/resnet18", heads=1)
    with pytest.raises(ValueError, match=r"create: timm cannot build resnet18\.tag with {}: Invalid pretrained tag"):
        create("timm/resnet18.tag")

    def offline(name: str, **settings: Any) -> nn.Module:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"create: the weights of timm/resnet18 cannot be had \(URLError: .*no route"):
        create("timm/resnet18", pretrained=True)


def test_torchvision_loads_no_weights_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def detector(*, weights: Any = None, weights_backbone: Any = "DEFAULT") -> nn.Module:
        given.update(weights=weights, backbone=weights_backbone)
        return nn.Identity()

    def classifier(*, weights: Any = None) -> nn.Module:
        given.update(weights=weights)
        return nn.Identity()

    builders: dict[str, Any] = {"detector": detector, "classifier": classifier}
    models = types.SimpleNamespace(
        list_models=lambda: list(builders),
        get_model_builder=builders.__getitem__,
        get_model=lambda name, **settings: builders[name](**settings),
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    create("torchvision/detector")
    assert given == {"weights": None, "backbone": None}
    create("torchvision/detector", weights_backbone="mine", pretrained=True)
    assert given == {"weights": "DEFAULT", "backbone": "mine"}
    create("torchvision/classifier", pretrained=False)
    assert given["weights"] is None


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())


def test_layers_without_a_shape_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"create: 0\.weight of .*:lazy has no shape yet: let the function run the model"
    ):
        create(f"{__name__}:lazy")
