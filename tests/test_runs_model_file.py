"""A network that was written opens again as the same network, whatever was changed in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn
from torch.nn.utils.parametrizations import weight_norm

from sepconv import explain, models
from sepconv.data import load
from sepconv.layers import DepthwiseConv2d, PointwiseConv2d, SeparableConv2d
from sepconv.runs import structure
from sepconv.runs.model_file import Card, open_model, read_card, write

CARD = Card("vgg_small", {"in_channels": 1, "width_mult": 0.25})


def _changed() -> nn.Module:
    """vgg_small with one replacement of every kind."""
    model = CARD.build()
    stages = model.stages
    stages[0][0][0] = nn.Conv2d(1, 8, 5, padding="same", padding_mode="reflect")
    stages[0][1][0] = SeparableConv2d(8, 8, 3, padding=1, bias=False, depth_multiplier=2)
    stages[1][0][0] = SeparableConv2d(8, 16, (3, 5), padding=(1, 2), norm="batch", activation="relu6")
    stages[1][0][1] = nn.Identity()
    stages[1][1][0] = SeparableConv2d(16, 16, 3, padding=2, dilation=2, pointwise_layers=2, activation="hardswish")
    stages[1][1][2] = nn.SiLU()
    stages[2][0][0] = PointwiseConv2d(16, 32, bias=False)
    stages[2][1][0] = SeparableConv2d(32, 32, 3, padding=1)
    stages[3][0][0] = nn.Conv2d(32, 64, 3, padding=1, groups=2)
    stages[3][1][0] = DepthwiseConv2d(64, 3, padding=1)
    return model.eval()


def test_network_of_every_kind_opens_as_it_was(tmp_path: Path) -> None:
    model = _changed()
    write(tmp_path / "model.safetensors", model, CARD.changed_to(model))
    opened, card = open_model(str(tmp_path))
    assert len(card.changes) == 10
    x = torch.randn(2, 1, 13, 11)
    assert torch.equal(opened(x), model(x))
    kernels = [[choice.op for choice in explain(network, x)] for network in (opened, model)]
    assert kernels[0] == kernels[1]
    assert {key: value.shape for key, value in opened.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_shared_module_stays_shared() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    layer = SeparableConv2d(4, 4, 3)
    changed = nn.Sequential(layer, nn.ReLU(), layer)
    changes = json.loads(json.dumps(structure.differences(plain, changed)))
    assert changes[1] == {"path": "2", "same_as": "0"}
    built = structure.apply(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), changes)
    assert built[0] is built[2]


def test_shared_weights_are_written_under_every_name(tmp_path: Path) -> None:
    model = CARD.build()
    model.stages[0][1][1] = model.stages[0][0][1]
    path = tmp_path / "model.safetensors"
    write(path, model, CARD)
    opened, _ = open_model(str(tmp_path))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(opened(x), model.eval()(x))


def test_unchanged_network_has_no_changes() -> None:
    assert structure.differences(CARD.build(), CARD.build()) == []


def _with_classes_of_its_own() -> nn.Module:
    """Every call makes new classes: one of the function, those of parametrized layers, and that of a traced network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = weight_norm(nn.Conv2d(1, 4, 3))
            self.second = nn.Conv2d(4, 4, 3)
            self.traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))

    return Net()


def test_classes_are_told_apart_by_their_names() -> None:
    plain, changed = _with_classes_of_its_own(), _with_classes_of_its_own()
    assert type(plain) is not type(changed)
    assert structure.differences(plain, changed) == []
    changed.second = SeparableConv2d(4, 4, 3)
    assert [change["path"] for change in structure.differences(plain, changed)] == ["second"]
    changed.first = nn.SELU()
    with pytest.raises(ValueError, match="first became a SELU, which cannot be described"):
        structure.differences(plain, changed)


def test_kind_that_is_not_known_cannot_be_written() -> None:
    model = CARD.build()
    model.stages[0][0][2] = nn.SELU()
    with pytest.raises(ValueError, match=r"stages\.0\.0\.2 became a SELU, which cannot be described"):
        CARD.changed_to(model)
    model = CARD.build()
    model.stages[0][1][0] = SeparableConv2d(8, 8, 3, padding=1, activation=nn.SELU)
    with pytest.raises(ValueError, match=r"stages\.0\.1\.0 became a SeparableConv2d"):
        CARD.changed_to(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "stages.0.0.0", "kind": "os.system", "arguments": {}, "children": {}}, "os.system"),
        ({"path": "nowhere.0", "kind": "Identity", "arguments": {}, "children": {}}, "nowhere"),
        ({"path": "stages.0.0.0", "kind": "Conv2d", "arguments": {"x": 1}, "children": {}}, "no description"),
        ({"path": "stages.0.0.0", "same_as": "nowhere"}, "nowhere"),
    ],
)
def test_damaged_description_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure.apply(CARD.build(), [change])


def test_card_survives_the_file(tmp_path: Path) -> None:
    card = CARD.with_data(load("digits"))
    write(tmp_path / "a.safetensors", card.build(), card)
    assert read_card(tmp_path / "a.safetensors") == card


def test_card_normalises_as_the_data_did() -> None:
    data = load("digits")
    images = data.test.images.take(torch.arange(5))
    torch.testing.assert_close(
        CARD.with_data(data).normalise(images), data.test.normalise(images), atol=1e-6, rtol=1e-6
    )


def test_a_network_without_values_is_refused() -> None:
    settings = {"in_features": 2, "out_features": 1, "device": "meta"}
    with pytest.raises(
        ValueError, match=r"open_model: weight of torch\.nn:Linear has no values \(it is on the meta device"
    ):
        open_model("torch.nn:Linear", None, settings)


def test_settings_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"description of vgg_small cannot be saved: .* got 'in_channels'"):
        write(tmp_path / "a.safetensors", CARD.build(), Card("vgg_small", {"in_channels": object()}))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_others_need_the_models_name(tmp_path: Path) -> None:
    model = models.create("vgg_small", width_mult=0.25)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not say which network it is of"):
        open_model(str(tmp_path))
    opened, card = open_model("vgg_small", tmp_path / "model.safetensors", {"width_mult": 0.25})
    assert card.changes == []
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(opened(x), model.eval()(x))


def test_random_weights_follow_the_seed_alone() -> None:
    first, _ = open_model("vgg_small", seed=1)
    torch.manual_seed(99)
    again, _ = open_model("vgg_small", seed=1)
    other, _ = open_model("vgg_small", seed=2)
    assert torch.equal(first.stages[0][0][0].weight, again.stages[0][0][0].weight)
    assert not torch.equal(first.stages[0][0][0].weight, other.stages[0][0][0].weight)
