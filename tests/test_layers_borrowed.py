"""Somebody else's model is in evaluation mode while we work with it and is left as it was."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sepconv
from sepconv.data import Data
from sepconv.layers.borrowed import because_of_weights, copied, evaluating, in_training
from sepconv.leaves import Inputs
from sepconv.runs import compare, latency, layer_data, onnx_file, png
from sepconv.runs.library import Device, export_library
from sepconv.runs.model_file import Card
from sepconv.runs.onnx_file import export_onnx
from sepconv.runs.predict import predict
from sepconv.train import Recipe, evaluate, train


def condition(model: nn.Module) -> list[Any]:
    """Everything about a model that work with it must leave alone."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(name, id(t), t.stride(), t.requires_grad, t._version, str(t.device)) for name, t in tensors],
        [t.tolist() for _, t in tensors],
    ]


class Merges(nn.Module):
    """Its own train() changes more than the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.merged = False

    def train(self, mode: bool = True) -> Merges:
        self.merged = not mode
        return super().train(mode)


def test_each_mode_is_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval(), Merges())
    model[1][0].train()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        assert not any(module.training for module in model.modules())
        assert not model[2].merged
        raise KeyError

    with pytest.raises(KeyError), evaluating(model, nn.Dropout()):
        fail()
    assert [module.training for module in model.modules()] == modes == [True, True, False, True, True]
    assert not model[2].merged


def exported(mode: bool) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout()).train(mode)
    return torch.export.export(model, (torch.ones(2, 1, 3, 3),)).module()


def test_an_exported_model_has_the_mode_it_was_exported_in() -> None:
    x = torch.randn(2, 1, 3, 3)
    model = exported(False)
    assert in_training(model) is None
    with evaluating(model):
        assert torch.equal(model(x), model(x))
    assert in_training(exported(True)) == ""
    with pytest.raises(ValueError, match=r"exported in training mode and stays in it: call eval\(\) on the model, th"):
        evaluating(exported(True)).__enter__()


def test_the_module_in_training_mode_is_named() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).eval()
    assert in_training(model) is None
    model[1].train()
    assert in_training(model) == "1"
    assert in_training(model.train()) == ""


def masked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def normed() -> nn.Module:
    conv = nn.Conv2d(1, 2, 3)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(conv)
    return nn.Sequential(conv)


def caching() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model[0].table = {"of": [model[0].weight * 2]}
    return model


@pytest.mark.parametrize("make", [masked, normed, caching])
def test_copies_of_modules_that_keep_computed_tensors(make) -> None:
    model = make()
    x = torch.randn(1, 1, 5, 5)
    y = model(x)
    y.sum().backward()
    other = copied(model, "test")
    assert torch.equal(other(x), y)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(model(x), y)
    assert not torch.equal(other(x), y)


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1))
    model[1].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^test: lock of layer '1' \(Conv2d\) cannot be copied \(TypeError: cannot p"):
        copied(model, "test")

    class Refuses(nn.Module):
        def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
            raise RuntimeError("no copies of me\nat all")

    with pytest.raises(
        ValueError, match=r"test: the model \(Refuses\) cannot be copied \(RuntimeError: no copies of m"
    ):
        copied(Refuses(), "test")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's, of a copy of what it exported
def test_compile_takes_a_model_exported_in_evaluation_and_says_what_to_do_with_others() -> None:
    x = torch.randn(2, 1, 3, 3)
    model = exported(False)
    torch.testing.assert_close(sepconv.compile(model, x)(x), model(x))
    with pytest.raises(ValueError, match=r"compile: the model is in training mode; export it after model\.eval\(\)"):
        sepconv.compile(exported(True), x)
    with pytest.raises(ValueError, match=r"compile: the model is in training mode; call model\.eval\(\) first"):
        sepconv.compile(nn.Dropout(), x)


class Scores(nn.Module):
    """Some of it frozen, some in another layout, with a hook and a mode of its own in every part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout())
        self.head = nn.Linear(8, 5)
        self.body[1].eval().requires_grad_(False)
        self.body[3].to(memory_format=torch.channels_last)
        self.body[2].register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def _card(data: Data) -> Card:
    return Card("x", {}).with_data(data)


def _image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(base64.b64decode(png.data_uri(torch.eye(6)[None]).partition(",")[2]))
    return path


WORK: dict[str, Callable[[nn.Module, Data, Path], object]] = {
    "evaluate": lambda model, data, _: evaluate(model, data.test),
    "answers": lambda model, data, _: compare.answers(model, data.test),
    "predict": lambda model, data, path: predict(model, _card(data), [_image(path)]),
    "predict compiled": lambda model, data, path: predict(model, _card(data), [_image(path)], compiled=True),
    "contenders": lambda model, data, _: latency.contenders(model, Inputs.of(data.calibration(1))),
    "count": lambda model, data, _: sepconv.count(model, data.input_shape),
    "convert": lambda model, data, _: sepconv.convert(model, data.calibration(9), depth_multiplier=1, sweeps=1),
    "explanation": lambda model, data, _: layer_data.collect(model, copied(model, "test"), data.calibration(1)),
    "export": lambda model, data, path: onnx_file.export_onnx(model, data.input_shape, path / "x.onnx"),
    "teach": lambda model, data, _: train(copied(model, "test"), data, Recipe(epochs=1, batch_size=30), teacher=model),
}


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:compile. .* has forward hooks:UserWarning"
)
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_whatever_is_done_with_a_model_leaves_it_as_it_was(work: Any, data: Data, tmp_path: Path) -> None:
    if work is WORK["export"]:
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    model = Scores()
    before, random = condition(model), torch.get_rng_state()
    work(model, data, tmp_path)
    assert condition(model) == before
    # Plans of sepconv.compile are filled with random numbers.
    if work not in (WORK["contenders"], WORK["predict compiled"]):
        assert torch.equal(torch.get_rng_state(), random)


def test_a_copy_that_shares_has_its_own_parameters_and_buffers_over_the_same_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    shared = copied(model, "test", sharing=True)
    for ours, models in zip(shared.parameters(), model.parameters(), strict=True):
        assert ours is not models
        assert ours.data_ptr() == models.data_ptr()
        assert ours.requires_grad == models.requires_grad
    shared.requires_grad_(False)
    assert model[0].bias.requires_grad
    assert shared[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    assert copied(model, "test", sharing=True).weight.data_ptr() != model.weight.data_ptr()


def test_a_copy_that_shares_has_computed_weights_of_its_own() -> None:
    model = prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=0.5)
    shared = copied(nn.Sequential(model), "test", sharing=True)
    assert shared[0].weight_orig.data_ptr() == model.weight_orig.data_ptr()
    assert shared[0].weight.data_ptr() != model.weight.data_ptr()


def test_weights_that_are_no_numbers_are_named_before_a_file_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    model.register_buffer("mask", torch.full((1,), -torch.inf))
    assert because_of_weights(model) == ""
    model[1].running_mean[0] = torch.nan
    assert because_of_weights(model) == ": so does its own 1.running_mean"
    model[0].weight.data[0] = torch.inf
    with pytest.raises(
        ValueError, match=r"export_onnx: the outputs .* hold NaN or infinity: so does its own 0\.weight"
    ):
        export_onnx(model, (1, 8, 8), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"export: the outputs .* hold NaN or infinity: so does its own 0\.weight"):
        export_library(model, Card("mine"), (1, 8, 8), tmp_path / "c", Device("x86-64-linux"))
    assert list(tmp_path.iterdir()) == []
