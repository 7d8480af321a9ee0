"""What a network that was trained elsewhere wants of images: read from its card, its library's words, and options."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sepconv import models
from sepconv.cli.arguments import Typed
from sepconv.data import Crop, Preprocessing, load
from sepconv.runs import model_file
from sepconv.runs.card import Card
from sepconv.runs.preprocessing import preprocessing_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic", "mean": MEAN, "std": STD}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm and torchvision as far as they describe models."""
    timm, torchvision = ModuleType("timm"), ModuleType("torchvision")
    config = SimpleNamespace(to_dict=lambda: CONFIG)
    timm.models = SimpleNamespace(  # type: ignore[attr-defined]
        get_pretrained_cfg=lambda name, allow_unregistered: config if name == "resnet18" else None
    )
    preset = SimpleNamespace(
        crop_size=[224], resize_size=[232], mean=MEAN, std=STD, interpolation=SimpleNamespace(value="bilinear")
    )
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: preset))
    detector = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: SimpleNamespace()))
    torchvision.models = SimpleNamespace(  # type: ignore[attr-defined]
        get_model_weights=lambda name: {"resnet18": weights, "fcos": detector}[name]
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)


@pytest.mark.parametrize(
    ("name", "fit"),
    [("timm/resnet18", Crop(224, 256, "bicubic")), ("torchvision/resnet18", Crop(224, 232))],
)
def test_the_librarys_words(libraries: None, name: str, fit: Crop) -> None:
    assert preprocessing_of(name) == Preprocessing(fit, MEAN, STD, source=name)


@pytest.mark.parametrize("name", ["timm/unknown", "torchvision/fcos", "vgg_small", "package.module:function"])
def test_where_nobody_says_it(libraries: None, name: str) -> None:
    assert preprocessing_of(name) is None


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/resnet18 needs the package timm \(pip install timm\)"):
        preprocessing_of("timm/resnet18")


PROCESSOR = {"image_mean": MEAN, "image_std": STD, "resample": 3, "size": {"shortest_edge": 256}}


@pytest.mark.parametrize(
    ("file", "content", "fit", "mean"),
    [
        ("config.json", {"pretrained_cfg": CONFIG}, Crop(224, 256, "bicubic"), MEAN),
        ("config.json", {"pretrained_cfg": {**CONFIG, "crop_mode": "squash", "crop_pct": 1}},
         Crop(224, 224, "bicubic", True), MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
         Crop(224, 256, "bicubic"), MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "size": {"height": 224, "width": 224}, "resample": 2},
         Crop(224, 224, "bilinear", True), MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "size": 224}, Crop(224, 224, "bicubic"), MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "size": {"shortest_edge": 224}, "crop_pct": 0.875},
         Crop(224, 256, "bicubic"), MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "size": {"shortest_edge": 384}, "crop_pct": 0.875},
         Crop(384, 384, "bicubic", True), MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "do_resize": False}, None, MEAN),
        ("preprocessor_config.json", {**PROCESSOR, "do_normalize": False}, Crop(256, 256, "bicubic"), (0.0,) * 3),
        ("preprocessor_config.json", {**PROCESSOR, "rescale_factor": 2 / 255, "image_mean": [1.0, 1.0, 1.0]},
         Crop(256, 256, "bicubic"), (0.5,) * 3),
        ("preprocessor_config.json", {**PROCESSOR, "do_rescale": False, "image_mean": [51.0, 102.0, 0.0]},
         Crop(256, 256, "bicubic"), (0.2, 0.4, 0.0)),
    ],
)  # fmt: skip
def test_files_beside_the_weights(
    tmp_path: Path, file: str, content: dict[str, Any], fit: Crop | None, mean: tuple[float, ...]
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    found = preprocessing_of("package.module:function", tmp_path / "weights.safetensors")
    assert found is not None
    assert found.fit == fit
    assert found.mean == pytest.approx(mean)
    assert found.source == str(tmp_path / file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**PROCESSOR, "resample": 1}, "resample is 1"),
        ({**PROCESSOR, "size": {"height": 200, "width": 224}}, "224x200 pixels are not square"),
        ({**PROCESSOR, "image_std": [0, 0, 0]}, "std above 0"),
        ({**PROCESSOR, "size": "large"}, "invalid literal"),
        ({"image_mean": MEAN}, "image_std"),
    ],
)
def test_damaged_files_beside_the_weights(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"preprocessor_config.json does not say how .*{message}"):
        preprocessing_of("package.module:function", tmp_path / "weights.safetensors")


def test_our_card_comes_first_and_survives_the_file(tmp_path: Path) -> None:
    wanted = Preprocessing(Crop(8, 9, "bicubic", True), (0.25,), (0.5,), source="before")
    card = Card("vgg_small", {"in_channels": 1, "width_mult": 0.25}).with_data(load("digits", preprocessing=wanted))
    model_file.write(tmp_path / model_file.FILE, models.create(card.model, **card.settings), card)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    found = preprocessing_of(str(tmp_path))
    assert found == replace(wanted, source="vgg_small")
    assert preprocessing_of("vgg_small", tmp_path / model_file.FILE) == found
    assert preprocessing_of("resnet20", tmp_path / model_file.FILE) != found


KNOWN = Preprocessing(Crop(224, 256, "bicubic"), MEAN, STD, source="timm/x")


@pytest.mark.parametrize(
    ("typed", "known", "expected"),
    [
        (Typed(), KNOWN, KNOWN),
        (Typed(), None, None),
        (Typed(image_size=112), KNOWN, replace(KNOWN, fit=Crop(112, 128, "bicubic"))),
        (Typed(crop=1.0), KNOWN, replace(KNOWN, fit=Crop(224, 224, "bicubic"))),
        (Typed(interpolation="nearest"), KNOWN, replace(KNOWN, fit=Crop(224, 256, "nearest"))),
        (Typed(image_size=64), None, Preprocessing(Crop(64, 64))),
        (Typed(image_size=7, crop=0.7), None, Preprocessing(Crop(7, 10))),
        (Typed(mean="0.5", std="0.25"), KNOWN, replace(KNOWN, mean=(0.5,), std=(0.25,), source="what was typed")),
        (Typed(bgr=True), KNOWN, replace(KNOWN, bgr=True)),
    ],
)
def test_what_is_typed_counts_more(typed: Typed, known: Preprocessing | None, expected: Preprocessing | None) -> None:
    assert typed.over(known) == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (Typed(crop=0.875), "--crop and --interpolation need --image-size"),
        (Typed(interpolation="bicubic"), "need --image-size"),
        (Typed(image_size=8, crop=0.0), "--crop must be above 0 and at most 1, such as 0.875, but got 0"),
        (Typed(image_size=8, crop=1.5), "but got 1.5"),
        (Typed(image_size=8, interpolation="cubic"), "interpolation must be one of"),
        (Typed(mean="0.5"), "--mean and --std go together"),
        (Typed(mean="0.5,x,1", std="1,1,1"), "--mean needs 1 or 3 numbers"),
        (Typed(mean="0.5,0.5", std="1,1"), "--mean needs 1 or 3 numbers"),
        (Typed(mean="0.5", std="nan"), "--std needs 1 or 3 numbers"),
        (Typed(mean="0.5", std="0"), "std above 0"),
    ],
)
def test_what_is_typed_and_cannot_be(typed: Typed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typed.over(None)
