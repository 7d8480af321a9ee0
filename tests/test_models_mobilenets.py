"""Every model trains, is deterministic, and has the widths, strides and names that its paper or library has."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import classes_of, images_for
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from sepconv.models import (
    InvertedResidual,
    MobileNetV1,
    MobileNetV1Normal,
    MobileNetV2,
    QuickNet,
    ResNet,
    VGGSmall,
    create,
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
IN_FLOAT64 = dict.fromkeys(("v1", "v1-small-grey", "v1-tf", "v2"), torch.float64)
small = pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)


@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        # In float64 PyTorch computes the many kinds of layers, for whose gradients kernels would be compiled.
        *(pytest.param(build, IN_FLOAT64.get(name, torch.float32), id=name) for name, build in SMALL.items()),
        *(
            pytest.param(SMALL[name], torch.float32, id=f"{name}-float32", marks=pytest.mark.slow)
            for name in IN_FLOAT64
        ),
    ],
)
def test_every_parameter_gets_a_finite_gradient_and_a_batch_is_learnt(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = build().to(dtype)
    x, target = images_for(model).to(dtype), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    losses = []
    for _ in range(8):
        y = model(x)
        assert y.shape == (3, classes_of(model))
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
    assert min(losses) < 0.85 * losses[0]  # three images at one pixel: the last loss is a matter of rounding


@small
def test_evaluation_is_deterministic_and_per_image(build: Callable[[], nn.Module]) -> None:
    model = build()
    x = images_for(model)
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
    x = images_for(model)
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
    y = model(images_for(model, *size, batch=1))
    assert y.shape == (1, classes_of(model))
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
