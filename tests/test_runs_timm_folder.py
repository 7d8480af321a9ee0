"""Folders as timm saves them for Hugging Face: a name that timm knows, numbers for it, and weights; no code."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sepconv.runs.model_file import open_model
from sepconv.runs.preprocessing import preprocessing_of
from sepconv.runs.timm_folder import timm_folder


def network(num_classes: int = 2, in_chans: int = 3, **other: Any) -> nn.Module:
    assert not set(other) - {"global_pool"}, other
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, **settings: Any) -> nn.Module:
        assert name == "small_net"
        return network(**settings)

    stub = types.SimpleNamespace(list_models=lambda: ["small_net"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", stub)


def write(folder: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = network(3, 1)
    save_file(model.state_dict(), folder / "model.safetensors")
    prepared = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "crop_pct": 1.0, "interpolation": "bicubic"}
    arguments = {"in_chans": 1, "global_pool": "avg", "checkpoint_path": "/etc/passwd", "pretrained": True}
    config = {"architecture": "small_net", "num_classes": 3, "model_args": arguments, "pretrained_cfg": prepared}
    config |= {"label_names": ["cat", "dog", "owl"], **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return model


def test_a_folder_opens_with_its_preparation_and_classes(tmp_path: Path, timm: None) -> None:
    model = write(tmp_path).eval()
    opened, card = open_model(str(tmp_path))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(opened(x), model(x))
    assert (card.model, card.classes) == ("timm/small_net", ["cat", "dog", "owl"])
    assert card.settings == {"in_chans": 1, "global_pool": "avg", "num_classes": 3}
    prepared = preprocessing_of(str(tmp_path))
    assert prepared is not None
    assert (prepared.mean, prepared.std) == ((0.5,), (0.25,))
    with pytest.raises(ValueError, match="is a trained network already: --weights and --set do not go with it"):
        open_model(str(tmp_path), settings={"num_classes": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "os:system"}, "timm has no model 'os:system'"),
        ({"architecture": "../small_net"}, "timm has no model"),
        ({"architectures": ["BertModel"]}, "describes a network of transformers, of which only timm's can be built"),
        ({"architecture": None}, r"does not say which network it is of"),
        ({"num_classes": 4}, r"does not fit|shape"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, timm: None, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        open_model(str(tmp_path))


def test_a_damaged_description_is_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"open_model: .*config\.json is damaged"):
        timm_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert timm_folder(str(tmp_path)) is None
    assert timm_folder("resnet20") is None
