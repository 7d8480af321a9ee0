"""Files of quantized networks: a quarter of the size, opened by the model's name to the same bits; nothing trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from quantizable import with_statistics
from safetensors.torch import load_file

from sepconv import models
from sepconv.cost import count
from sepconv.leaves import Inputs
from sepconv.quantize import is_quantized, quantize
from sepconv.quantize.saving import packed, rebuilt
from sepconv.runs.model_file import Card, open_model, read_card, write

SETTINGS = {"in_channels": 1, "num_classes": 10, "width_mult": 0.25}


class _Saved(NamedTuple):
    path: Path
    original: Any
    quantized: Any
    card: Card


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> _Saved:
    torch.manual_seed(0)
    model = with_statistics(models.create("vgg_small", **SETTINGS))
    quantized, _ = quantize(model, torch.randn(32, 1, 8, 8), skip=("stages.0.0.0",))
    card = Card("vgg_small", SETTINGS, input_shape=(1, 8, 8)).changed_to(quantized)
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    write(path, quantized, card)
    return _Saved(path, model, quantized, card)


@torch.no_grad()
def test_it_opens_to_the_same_bits(saved: _Saved) -> None:
    opened, card = open_model(str(saved.path))
    assert card == saved.card
    assert is_quantized(opened)
    assert not is_quantized(saved.original)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(opened(x), saved.quantized(x))
    again = saved.path.with_name("again.safetensors")
    write(again, opened, card)
    assert again.read_bytes() == saved.path.read_bytes()


def test_weights_are_bytes(saved: _Saved) -> None:
    state = load_file(saved.path)
    left = {f"{name}.weight" for name in saved.card.quantized["left"]}
    weights = {name for name, tensor in state.items() if tensor.dim() > 1}
    assert {name for name in weights if state[name].dtype == torch.int8} == weights - left
    assert not any(name.endswith("weight_quantizer.zero_point") for name in state)


def test_layers_are_counted_as_those_of_the_original(saved: _Saved) -> None:
    before, after = count(saved.original, (1, 8, 8)), count(saved.quantized, (1, 8, 8))
    assert (after.macs, after.conv_params) == (before.macs, before.conv_params)
    assert [row.name for row in after.layers if row.macs] == [row.name for row in before.layers if row.macs]


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ({"left": ["body"]}, "the network has no layer 'body'"),
        ({"left": 3}, "quantized must be empty, or the names of layers"),
        ({"run": []}, "quantized must be empty, or the names of layers"),
    ],
)
def test_damaged_descriptions_are_refused(
    saved: _Saved, quantized: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Card, "check", lambda card: None)
        write(path, saved.quantized, replace(saved.card, quantized=quantized))
    with pytest.raises(ValueError, match=message):
        open_model(str(path))


def test_a_file_of_other_sizes_is_refused_before_any_work(saved: _Saved, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, saved.quantized, replace(saved.card, settings={**SETTINGS, "num_classes": 1000}))
    with pytest.raises(ValueError, match=r"does not hold the network that it describes: .*weight is \(1000, "):
        open_model(str(path))
    write(path, saved.quantized, replace(saved.card, input_shape=()))
    with pytest.raises(ValueError, match="a quantized network needs an input_shape"):
        open_model(str(path))
    assert read_card(path) is not None


@pytest.mark.slow
def test_mobilenet_takes_little_more_than_a_quarter() -> None:
    model = models.create("mobilenet_v1", num_classes=10, width_mult=0.5, small_images=True).eval()
    whole = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    state = packed(rebuilt(model, Inputs((torch.zeros(2, 3, 32, 32),)), ()))
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) <= 0.275 * whole
