"""Models load the weights of others, and refuse what are none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.models import MobileNetV1, ResNet, VGGSmall, from_huggingface, load_weights


def _huggingface_state(widths: list[int], classes: int) -> dict[str, Tensor]:
    """Random weights in the names and the order of transformers' MobileNetV1ForImageClassification."""
    state: dict[str, Tensor] = {}

    def layer(name: str, weight: Tensor) -> None:
        state[f"mobilenet_v1.{name}.convolution.weight"] = weight
        norm, channels = f"mobilenet_v1.{name}.normalization", weight.shape[0]
        state[f"{norm}.weight"] = torch.rand(channels) + 0.5
        state[f"{norm}.bias"] = torch.randn(channels)
        state[f"{norm}.running_mean"] = torch.randn(channels) * 0.1
        state[f"{norm}.running_var"] = torch.rand(channels) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    layer("conv_stem", torch.randn(widths[0], 3, 3, 3) / 5)
    for i in range(13):
        layer(f"layer.{2 * i}", torch.randn(widths[i], 1, 3, 3) / 3)
        layer(f"layer.{2 * i + 1}", torch.randn(widths[i + 1], widths[i], 1, 1) / widths[i] ** 0.5)
    state["classifier.weight"] = torch.randn(classes, widths[-1])
    state["classifier.bias"] = torch.randn(classes)
    return state


def _huggingface_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What transformers computes from these weights: TensorFlow's padding, epsilon 1e-3, ReLU6."""
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    names = ["conv_stem", *(f"layer.{i}" for i in range(26))]
    for i, name in enumerate(f"mobilenet_v1.{name}" for name in names):
        weight = state[f"{name}.convolution.weight"]
        stride = 2 if i == 0 else strides[(i - 1) // 2] if i % 2 else 1
        if weight.shape[-1] == 3:
            missing = [3 - (size % stride or stride) for size in x.shape[2:]]
            x = F.pad(x, [a for m in reversed(missing) for a in (m // 2, m - m // 2)])
        x = F.conv2d(x, weight, stride=stride, groups=weight.shape[0] if i % 2 else 1)
        norm = [state[f"{name}.normalization.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu6(F.batch_norm(x, *norm, eps=1e-3))
    return F.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def test_mobilenet_v1_loads_hugging_faces_weights(tmp_path: Path) -> None:
    state = _huggingface_state([8, 16, 32, 32, 64, 64, *(128,) * 6, 256, 256], 1001)
    assert len(state) == 164
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    model = MobileNetV1(0.25, 1001, tf_padding=True).eval()
    assert list(from_huggingface(state)) == list(model.state_dict())
    load_weights(model, path)
    # In float64, since thirty layers in a row magnify rounding.
    double = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    for size in (48, 65):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        torch.testing.assert_close(model.double()(x), _huggingface_forward(double, x), rtol=1e-9, atol=1e-9)
    with pytest.warns(UserWarning, match=r"has Hugging Face's names; .* need MobileNetV1\(tf_padding=True\)"):
        load_weights(MobileNetV1(0.25, 1001), path)
    with pytest.raises(
        ValueError, match=r"does not fit MobileNetV1: .*classifier\.1\.weight is \(1001, 256\) in the file"
    ):
        load_weights(MobileNetV1(0.25, 1000, tf_padding=True), path)


def test_the_bare_hugging_face_model_has_no_prefix_and_no_classifier() -> None:
    state = _huggingface_state([8, 16, 32, 32, 64, 64, *(128,) * 6, 256, 256], 10)
    bare = {key.removeprefix("mobilenet_v1."): tensor for key, tensor in state.items() if "classifier" not in key}
    model = MobileNetV1(0.25, 10)
    missing, unexpected = model.load_state_dict(from_huggingface(bare), strict=False)
    assert (missing, unexpected) == (["classifier.1.weight", "classifier.1.bias"], [])
    assert torch.equal(model.blocks[5].pointwise_norm.bias, bare["layer.11.normalization.bias"])


@pytest.mark.parametrize("key", ["conv_1x1.convolution.weight", "layer.x.convolution.weight", "layer.1.1.bias"])
def test_from_huggingface_refuses_other_networks(key: str) -> None:
    with pytest.raises(ValueError, match=f"from_huggingface: '{key}' is no key of a MobileNet v1"):
        from_huggingface({key: torch.zeros(1)})


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trapped"),)


def _pickled(save: Callable[[Any, Any], None]) -> bytes:
    buffer = io.BytesIO()
    save(_Trap(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*weights: No such file"),
        (_pickled(torch.save), "is damaged or needs more than tensors .* would run code; save the weights alone"),
        (_pickled(lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False)), "would run code"),
        (_pickled(pickle.dump), "would run code"),
        (_pickled(lambda x, f: pickle.dump(x, f, protocol=0)), "is truncated or no safetensors file"),
        (b"", "is truncated or no safetensors file"),
        (b"<html>not found</html>", "is truncated or no safetensors file"),
    ],
)
def test_files_that_are_no_weights(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"load_weights: .*{message}") as error:
        load_weights(VGGSmall(0.25), path)
    assert "\n" not in str(error.value)
    assert not Path("trapped").exists()


@pytest.mark.parametrize("nested", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_pytorch(nested: str | None, prefix: str, zipped: bool, tmp_path: Path) -> None:
    model, copied, path = nn.Linear(3, 2), nn.Linear(3, 2), tmp_path / "weights.pth"
    tensors: Any = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    whole = tensors if nested is None else {"epoch": 3, "best": 0.5, nested: tensors}
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    load_weights(copied, path)
    assert torch.equal(copied.weight, model.weight)


class _Named(nn.Module):
    """A network whose names begin as wrappers' do, or hold others'."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model.", "model.net."])
def test_names_of_what_was_around_the_network(prefix: str, suffix: str, tmp_path: Path) -> None:
    model, copied = (_Named(first=nn.Linear(3, 2), second=nn.Linear(2, 2)) for _ in range(2))
    given = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    save_file(given, path) if suffix == ".safetensors" else torch.save(given, path)
    load_weights(copied, path)
    assert torch.equal(copied.second.weight, model.second.weight)  # type: ignore[union-attr]


def test_averaged_and_partly_compiled_networks(tmp_path: Path) -> None:
    model, copied = (_Named(body=nn.Linear(3, 2), head=nn.Linear(2, 2)) for _ in range(2))
    torch.save({"model_ema": torch.optim.swa_utils.AveragedModel(model).state_dict()}, tmp_path / "average.pt")
    load_weights(copied, tmp_path / "average.pt")
    assert torch.equal(copied.body.weight, model.body.weight)  # type: ignore[union-attr]
    given = {name.replace("body.", "body._orig_mod."): 2 * tensor for name, tensor in model.state_dict().items()}
    torch.save(given, tmp_path / "parts.pt")
    load_weights(copied, tmp_path / "parts.pt")
    assert torch.equal(copied.body.weight, 2 * model.body.weight)  # type: ignore[union-attr, operator]


def test_names_of_the_networks_own_stay(tmp_path: Path) -> None:
    model, copied = (_Named(module=nn.Linear(3, 2)) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "own.pt")
    load_weights(copied, tmp_path / "own.pt")
    assert torch.equal(copied.module.weight, model.module.weight)  # type: ignore[union-attr]
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"4 keys unknown to the model: 0\.bias, 0\.weight, 1\.bias"):
        load_weights(copied, tmp_path / "other.pt")


def test_a_state_dict_beside_other_tensors(tmp_path: Path) -> None:
    model, copied = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save({"best": torch.tensor(0.9), "state_dict": model.state_dict()}, tmp_path / "weights.pt")
    load_weights(copied, tmp_path / "weights.pt")
    assert torch.equal(copied.weight, model.weight)


def test_checkpoint_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt holds no state_dict, alone or under one of state_dict_ema, "):
        load_weights(nn.Linear(3, 2), tmp_path / "weights.pt")


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    path, model = tmp_path / "weights.safetensors", nn.Linear(3, 2)
    for length in range(256):
        save_file(model.state_dict(), path, metadata={"note": "x" * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    copied = nn.Linear(3, 2)
    load_weights(copied, path)
    assert torch.equal(copied.weight, model.weight)


def test_folder_and_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_weights: cannot read .*: Is a directory"):
        load_weights(VGGSmall(0.25), tmp_path)
    path = tmp_path / "weights.safetensors"
    save_file(VGGSmall(0.25).state_dict(), path)
    whole = path.read_bytes()
    for length in (1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights\.safetensors is truncated or no safetensors file"):
            load_weights(VGGSmall(0.25), path)


def test_weights_of_another_architecture_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(ResNet(8).state_dict(), path)
    model = VGGSmall(0.25)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not fit VGGSmall") as error:
        load_weights(model, path)
    message = str(error.value)
    assert "40 keys missing in the file: stages.0.0.0.weight, stages.0.0.1.weight, stages.0.0.1.bias, ..." in message
    assert "keys unknown to the model: blocks.0.first.0.weight, " in message
    assert "\n" not in message
    save_file(VGGSmall(0.5).state_dict(), path)
    shape = r"stages\.0\.0\.0\.weight is \(16, 3, 3, 3\) in the file and \(8, 3, 3, 3\) in the model, .*, \.\.\.$"
    with pytest.raises(ValueError, match=shape):
        load_weights(model, path)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_tied_tensors_and_missing_counters_load(tmp_path: Path) -> None:
    model, path = VGGSmall(0.25), tmp_path / "weights.safetensors"
    model.stages[1][1][0].weight = nn.Parameter(torch.randn(16, 16, 3, 3))
    model.tied = model.stages[1][1]
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("tied.") and "num_batches" not in k}
    save_file(state, path)
    fresh = copy.deepcopy(model)
    nn.init.zeros_(fresh.tied[0].weight)
    load_weights(fresh, path)
    assert torch.equal(fresh.tied[0].weight, model.tied[0].weight)
    assert load_file(path).keys() == state.keys()
