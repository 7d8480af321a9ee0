"""Every model trains, keeps its names, and loads the weights of others; bad input is named in one line."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.models import (
    BUILT_IN,
    InvertedResidual,
    MobileNetV1,
    MobileNetV1Normal,
    MobileNetV2,
    QuickNet,
    ResNet,
    VGGSmall,
    create,
    from_huggingface,
    load_weights,
)
from sepconv.models.mobilenet_v1 import same_pad
from sepconv.models.mobilenet_v2 import round_channels

# One row per model and per setting that changes what is built.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "v1": lambda: MobileNetV1(0.25, 5),
    "v1-small-grey": lambda: MobileNetV1(0.25, 5, 1, small_images=True),
    "v1-tf": lambda: MobileNetV1(0.25, 5, tf_padding=True, dropout=0.5),
    "v1-normal": lambda: MobileNetV1Normal(0.25, 5, small_images=True),
    "v2": lambda: MobileNetV2(0.35, 5),
    "v2-small-grey": lambda: MobileNetV2(0.35, 5, 1, small_images=True, round_nearest=1),
    "vgg": lambda: VGGSmall(0.25, 5, dropout=0.1),
    "vgg-grey": lambda: VGGSmall(1.0, 10, 1),
    "quick": lambda: QuickNet(False, 0.25, 5, dropout=0.1),
    "quick-residual-grey": lambda: QuickNet(True, 0.25, 5, 1),
    "quick-gelu": lambda: QuickNet(False, 0.25, 5, activation="gelu"),
    "resnet": lambda: ResNet(8, num_classes=5),
    "resnet-projection": lambda: ResNet(14, 0.5, 5, 1, shortcut="projection"),
}
small = pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)


def _images(model: nn.Module, height: int = 32, width: int = 32, batch: int = 3) -> Tensor:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return torch.randn(batch, first.in_channels, height, width)


def _classes(model: nn.Module) -> int:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1].out_features


@small
def test_every_parameter_gets_a_finite_gradient_and_a_batch_is_learnt(build: Callable[[], nn.Module]) -> None:
    model = build()
    x, target = _images(model), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    losses = []
    for _ in range(8):
        y = model(x)
        assert y.shape == (3, _classes(model))
        assert y.isfinite().all()
        loss = F.cross_entropy(y, target)
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.count_nonzero() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


@small
def test_evaluation_is_deterministic_and_per_image(build: Callable[[], nn.Module]) -> None:
    model = build()
    x = _images(model)
    for _ in range(3):
        model(x)  # the running statistics leave their start
    model.eval()
    with torch.no_grad():
        y = model(x)
        assert torch.equal(model(x), y)
        torch.testing.assert_close(model(x.flip(0)), y.flip(0), rtol=1e-4, atol=1e-4)
        assert y.std(0).max() > 0


@small
def test_copies_and_files_give_the_same_outputs(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    x = _images(model)
    model(x)
    model.eval()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    fresh = build().eval()
    assert not torch.equal(fresh(x), expected)
    load_weights(fresh, tmp_path / "weights.safetensors")
    assert torch.equal(fresh(x), expected)


@small
@pytest.mark.parametrize("size", [(8, 8), (31, 67)])
def test_image_sizes(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    model = build().eval()
    if isinstance(model, QuickNet) and min(size) < 9:
        size = (9, 9)
    y = model(_images(model, *size, batch=1))
    assert y.shape == (1, _classes(model))
    assert y.isfinite().all()


@pytest.mark.parametrize("build", [MobileNetV1, MobileNetV1Normal])
@pytest.mark.parametrize(("alpha", "widths"), [(1.0, (32, 64, 1024)), (0.25, (8, 16, 256)), (0.2, (8, 12, 204))])
def test_mobilenet_v1_widths_and_strides(build: Any, alpha: float, widths: tuple[int, ...]) -> None:
    convs = [module for module in build(alpha).modules() if isinstance(module, nn.Conv2d)]
    assert (convs[0].out_channels, convs[2].out_channels if convs[1].groups > 1 else convs[1].out_channels) == widths[
        :2
    ]
    assert convs[-1].out_channels == widths[2]
    spatial = [conv for conv in convs if conv.kernel_size == (3, 3)]
    # The stem, then the 13 blocks; the last one has stride 1, unlike the paper's misprint.
    assert [conv.stride[0] for conv in spatial] == [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_the_normal_twin_has_the_same_interface_and_sizes() -> None:
    assert inspect.signature(MobileNetV1) == inspect.signature(MobileNetV1Normal)
    for settings in ({}, {"small_images": True}, {"tf_padding": True}):
        shapes: list[list[torch.Size]] = []
        for build in (MobileNetV1, MobileNetV1Normal):
            model, seen = build(0.25, 10, **settings), []
            for block in model.blocks:
                block.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.shape))
            model(torch.randn(2, 3, 45, 64))
            shapes.append(seen)
        assert shapes[0] == shapes[1]
        assert len(shapes[0]) == 13


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v1_normal", "mobilenet_v2"])
@pytest.mark.parametrize(("size", "last"), [(32, 4), (28, 4), (8, 1)])
def test_small_images_shrink_eightfold(name: str, size: int, last: int) -> None:
    model = create(name, width_mult=0.25, num_classes=10, small_images=True).eval()
    seen = []
    body = model.features if name == "mobilenet_v2" else model.blocks
    body[-1].register_forward_hook(lambda module, args, y: seen.append(y.shape[2:]))
    model(torch.randn(1, 3, size, size))
    assert seen == [(last, last)]


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 2), (3, 3), (2, 3)])
def test_same_pad_is_tensorflows_rule(size: int, kernel_size: int, stride: int) -> None:
    """ceil(size / stride) outputs; of the missing pixels the smaller half stands in front."""
    outputs = -(-size // stride)
    missing = max((outputs - 1) * stride + kernel_size - size, 0)
    padded = same_pad(torch.ones(1, 1, size, 4), kernel_size, stride)
    column = padded[0, 0, :, padded.shape[3] // 2]
    assert column.tolist() == [0] * (missing // 2) + [1] * size + [0] * (missing - missing // 2)


def test_tf_padding_differs_for_even_sizes_alone() -> None:
    plain, padded = MobileNetV1(0.25, 10).eval(), MobileNetV1(0.25, 10, tf_padding=True).eval()
    padded.load_state_dict(plain.state_dict())
    odd, even = torch.randn(1, 3, 33, 33), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(padded(odd), plain(odd))
    assert (padded(even) - plain(even)).abs().max() > 1e-4


def test_mobilenet_v2_has_torchvisions_names() -> None:
    def conv_norm(prefix: str, before: int, after: int, kernel: int, groups: int = 1) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.0.weight": (after, before // groups, kernel, kernel), **norm(f"{prefix}.1", after)}

    def norm(prefix: str, channels: int) -> dict[str, tuple[int, ...]]:
        names = ("weight", "bias", "running_mean", "running_var")
        return {**{f"{prefix}.{name}": (channels,) for name in names}, f"{prefix}.num_batches_tracked": ()}

    expected = conv_norm("features.0", 3, 32, 3)
    table = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    before, i = 32, 1
    for t, after, repetitions in table:
        for _ in range(repetitions):
            hidden, prefix, j = t * before, f"features.{i}.conv", 0
            if t > 1:
                expected |= conv_norm(f"{prefix}.0", before, hidden, 1)
                j = 1
            expected |= conv_norm(f"{prefix}.{j}", hidden, hidden, 3, groups=hidden)
            expected[f"{prefix}.{j + 1}.weight"] = (after, hidden, 1, 1)
            expected |= norm(f"{prefix}.{j + 2}", after)
            before, i = after, i + 1
    expected |= conv_norm("features.18", 320, 1280, 1)
    expected |= {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}
    state = MobileNetV2().state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected
    assert list(state) == list(expected)


def test_mobilenet_v2_rounds_channels_as_torchvision() -> None:
    """Widths of torchvision at 0.35 and 1.4; below 1 the last layer keeps 1280 channels."""
    stems = {width: MobileNetV2(width).features[0][0].out_channels for width in (0.35, 0.5, 0.75, 1.4)}
    assert stems == {0.35: 16, 0.5: 16, 0.75: 24, 1.4: 48}
    lasts = {width: MobileNetV2(width).classifier[1].in_features for width in (0.35, 1.4)}
    assert lasts == {0.35: 1280, 1.4: 1792}
    assert MobileNetV2(0.35, round_nearest=1).features[0][0].out_channels == 11


@pytest.mark.parametrize(
    ("channels", "rounded"),
    [(1, 8), (8.8, 8), (8.9, 16), (9.5, 16), (11.2, 16), (33.6, 32), (44.8, 48), (1792.0, 1792)],
)
def test_rounding_loses_less_than_a_tenth(channels: float, rounded: int) -> None:
    assert round_channels(channels, 8) == rounded


@pytest.mark.parametrize(("out_channels", "stride"), [(4, 1), (4, 2), (6, 1)])
def test_an_inverted_residual_adds_its_input_where_it_fits(out_channels: int, stride: int) -> None:
    block = InvertedResidual(4, out_channels, stride, 6)
    x = torch.randn(2, 4, 7, 7)
    nn.init.zeros_(block.conv[-1].weight)
    y = block(x)
    if (out_channels, stride) == (4, 1):
        assert torch.equal(y, x)
    else:
        assert torch.equal(y, torch.zeros(2, out_channels, -(-7 // stride), -(-7 // stride)))


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
        (_pickled(torch.save), "is a pickle .* never read because reading runs the code in it; save the weights with"),
        (_pickled(lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False)), "is a pickle"),
        (_pickled(pickle.dump), "is a pickle"),
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


@pytest.mark.parametrize("name", BUILT_IN)
def test_create_builds_every_name(name: str) -> None:
    model = create(name, num_classes=7, width_mult=0.5, in_channels=1)
    assert _classes(model) == 7
    assert _images(model).shape[1] == 1
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
            r"mobilenet_v1, .*resnet110, and the forms timm/NAME and package\.module:function",
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


def test_depthwise_filters_start_as_wide_as_their_own_inputs_ask() -> None:
    """Nine inputs a filter: a standard deviation of sqrt(2/9), whatever the number of channels."""
    model = MobileNetV1()
    assert model.blocks[12].depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.blocks[12].pointwise.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("name", "kind"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("silu", nn.SiLU)])
@pytest.mark.parametrize("residual", [False, True])
def test_quick_networks_activate_alike_everywhere(name: str, kind: type[nn.Module], residual: bool) -> None:
    model = QuickNet(residual, 0.25, activation=name)
    active = [type(m) for m in model.modules() if isinstance(m, (nn.ReLU, nn.GELU, nn.SiLU))]
    assert active == [kind] * (10 if residual else 7)
