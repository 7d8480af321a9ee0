"""Counts against the literature, against formulas, and against sums of ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.cost import Layer, count, counter, separable_ratio
from sepconv.models import MobileNetV1, MobileNetV1Normal, MobileNetV2, ResNet, VGGSmall

# Howard et al. 2017, recomputed from its Table 1: max(int(width * alpha), 8) channels, ceil(size / stride) pixels.
RESOLUTIONS = (224, 192, 160, 128)
MACS = {
    1.0: (568_740_352, 418_121_728, 290_675_200, 186_400_768),
    0.75: (325_400_448, 239_273_472, 166_396_800, 106_770_432),
    0.5: (149_497_088, 109_970_432, 76_524_800, 49_160_192),
    0.25: (41_030_272, 30_212_608, 21_059_200, 13_570_048),
}
# Trainable, and with the running statistics (the total of a Keras summary).
PARAMS = {
    1.0: (4_231_976, 4_253_864),
    0.75: (2_585_560, 2_601_976),
    0.5: (1_331_592, 1_342_536),
    0.25: (470_072, 475_544),
}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("alpha", MACS)
def test_mobilenet_v1_macs_of_every_width_and_resolution(alpha: float, resolution: int) -> None:
    cost = count(MobileNetV1(alpha), (3, resolution, resolution))
    assert cost.macs == MACS[alpha][RESOLUTIONS.index(resolution)]
    assert (cost.params, cost.params + cost.buffers) == PARAMS[alpha]
    assert sum(layer.params for layer in cost.layers) == cost.params


@pytest.mark.parametrize(("classes", "params"), [(10, 3_217_226), (100, 3_309_476)])
def test_mobilenet_v1_params_of_other_heads(classes: int, params: int) -> None:
    assert count(MobileNetV1(num_classes=classes), (3, 32, 32)).params == params


@pytest.mark.parametrize(
    ("alpha", "resolution", "params", "macs"),
    [(1.0, 224, 3_185_088, 567_716_352), (0.75, 128, 1_800_144, 106_002_432)],
)
def test_mobilenet_v1_convolutions_alone(alpha: float, resolution: int, params: int, macs: int) -> None:
    """Totals that the documentation of TF-slim prints, without the classifier."""
    cost = count(MobileNetV1(alpha), (3, resolution, resolution))
    assert cost.conv_params == params
    assert sum(layer.macs for layer in cost.layers if layer.kind != "linear") == macs


def test_mobilenet_v1_shares_of_table_2() -> None:
    layers = count(MobileNetV1(), (3, 224, 224)).layers
    macs = {kind: sum(layer.macs for layer in layers if layer.kind == kind) for kind in _KINDS}
    assert macs == {"pointwise": 539_492_352, "depthwise": 17_385_984, "normal": 10_838_016, "linear": 1_024_000}
    percent = {kind: round(100 * part / sum(macs.values()), 2) for kind, part in macs.items()}
    # The paper prints 1.19 for the stem, a misprint: its column would add up to 99.29.
    assert percent == {"pointwise": 94.86, "depthwise": 3.06, "normal": 1.91, "linear": 0.18}

    weights = {kind: sum(layer.params for layer in layers if layer.kind == kind) for kind in _KINDS}
    weights["linear"] -= 1000  # the bias, which the paper leaves out
    assert weights == {"pointwise": 3_139_584, "depthwise": 44_640, "normal": 864, "linear": 1_024_000}
    percent = {kind: round(100 * part / sum(weights.values()), 2) for kind, part in weights.items()}
    assert percent == {"pointwise": 74.59, "depthwise": 1.06, "normal": 0.02, "linear": 24.33}


_KINDS = ("pointwise", "depthwise", "normal", "linear")


def test_mobilenet_v1_normal_is_table_4() -> None:
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    sizes = [112, 112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]
    weights = [9 * before * after for before, after in zip([3, *widths], widths, strict=False)]
    macs = sum(w * size**2 for w, size in zip(weights, sizes, strict=True)) + 1024 * 1000
    cost = count(MobileNetV1Normal(), (3, 224, 224))
    assert (cost.macs, cost.conv_params) == (macs, sum(weights))
    assert round(cost.macs / 1e6, 1) == 4867.3
    assert cost.params == sum(weights) + 2 * sum(widths) + 1024 * 1000 + 1000
    assert round(cost.params / 1e6, 2) == 29.29
    # Its separable form is MobileNet, but for the stem, which is separable too, and the norms between.
    separable = count(MobileNetV1(), (3, 224, 224))
    stem = {"normal": 9 * 3 * 32, "separable": 3 * (9 + 32)}
    assert cost.separable_macs == separable.macs + (stem["separable"] - stem["normal"]) * 112**2
    inner_norms = 2 * sum(widths[:-1])
    assert cost.separable_params == separable.params + stem["separable"] - stem["normal"] - inner_norms


def test_shallow_mobilenet_of_table_5() -> None:
    """Five of the blocks with 512 channels removed: 307 M multiply-adds and 2.9 M parameters."""
    model = MobileNetV1()
    model.blocks = nn.Sequential(*model.blocks[:6], *model.blocks[11:])
    model.strides = model.strides[:7] + model.strides[12:]
    cost = count(model, (3, 224, 224))
    assert (round(cost.macs / 1e6, 1), round(cost.params / 1e6, 3)) == (307.3, 2.888)


def test_one_layer_of_table_3() -> None:
    normal = count(nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 14, 14))
    separable = count(sepconv.SeparableConv2d(512, 512, 3, padding=1, bias=False), (512, 14, 14))
    assert (round(normal.macs / 1e6), round(normal.params / 1e6, 2)) == (462, 2.36)
    assert (round(separable.macs / 1e6, 1), round(separable.params / 1e6, 2)) == (52.3, 0.27)
    assert (normal.separable_macs, normal.separable_params) == (separable.macs, separable.params)


@pytest.mark.parametrize(("resolution", "expected"), [(224, 300_774_272), (96, None)])
def test_mobilenet_v2_by_formula(resolution: int, expected: int | None) -> None:
    """Sandler et al. 2018, Table 2, summed block by block."""
    size = resolution // 2
    macs, weights, normed, before = 9 * 3 * 32 * size**2, 9 * 3 * 32, 32, 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for t, c, n, s in table:
        for i in range(n):
            hidden, stride = t * before, s if i == 0 else 1
            expansion = before * hidden if t > 1 else 0
            macs += expansion * size**2
            size //= stride
            macs += (9 * hidden + hidden * c) * size**2
            weights += expansion + 9 * hidden + hidden * c
            normed += (hidden if t > 1 else 0) + hidden + c
            before = c
    macs += 320 * 1280 * size**2 + 1280 * 1000
    weights, normed = weights + 320 * 1280, normed + 1280
    cost = count(MobileNetV2(), (3, resolution, resolution))
    assert (cost.macs, cost.conv_params) == (macs, weights)
    assert cost.params == weights + 2 * normed + 1280 * 1000 + 1000 == 3_504_872
    assert expected in (cost.macs, None)


def test_teachers() -> None:
    """He et al. 2016, Table 6: 0.27 M for 20 layers; 41 M multiply-adds. The plain network: 1/8.5 when separable."""
    resnet = count(ResNet(20), (3, 32, 32))
    assert (resnet.params, round(resnet.macs / 1e6)) == (269_722, 41)
    assert count(ResNet(20, shortcut="projection"), (3, 32, 32)).params == 272_474
    vgg = count(VGGSmall(), (3, 32, 32))
    assert vgg.conv_params == 1_171_296
    separable = sum(layer.separable_params - layer.params for layer in vgg.layers[1:]) + vgg.conv_params
    assert round(vgg.conv_params / separable, 2) == 8.53


class Call(nn.Module):
    """A module made of a function of its input and its one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


OPERATIONS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("normal", nn.Conv1d(3, 5, 4, bias=False), (3, 11)),
    ("normal", nn.Conv2d(3, 5, (1, 7), (2, 3), bias=False), (3, 5, 23)),
    ("normal", nn.Conv2d(4, 3, 3, dilation=2, bias=False), (4, 7, 11)),
    ("normal", nn.Conv3d(2, 3, 2, bias=False), (2, 3, 4, 5)),
    ("normal", nn.Conv2d(1, 3, 3, bias=False), (1, 5, 5)),
    ("pointwise", nn.Conv2d(7, 5, 1, 2, bias=False), (7, 5, 5)),
    ("pointwise", sepconv.PointwiseConv2d(7, 5, stride=2, bias=False), (7, 5, 5)),
    ("pointwise", sepconv.PointwiseConv1d(7, 5, bias=False), (7, 3)),
    ("grouped", nn.Conv2d(6, 4, 3, groups=2, bias=False), (6, 5, 5)),
    ("depthwise", nn.Conv2d(6, 12, 3, groups=6, bias=False), (6, 5, 5)),
    ("depthwise", sepconv.DepthwiseConv2d(6, 3, bias=False, depth_multiplier=2), (6, 5, 5)),
    ("depthwise", sepconv.DepthwiseConv2d(1, 3, bias=False, depth_multiplier=2), (1, 5, 5)),
    ("depthwise", sepconv.DepthwiseConv3d(3, (1, 2, 3), 2, bias=False), (3, 4, 5, 6)),
    ("transposed", nn.ConvTranspose2d(3, 5, 3, 2, bias=False), (3, 4, 5)),
    ("transposed", nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (4, 5)),
    ("linear", nn.Linear(7, 5, bias=False), (7,)),
    ("linear", nn.Linear(7, 5, bias=False), (3, 7)),
    ("linear", Call(lambda x, w: torch.einsum("nchw,oc->nohw", x, w), 5, 7), (7, 3, 2)),
    ("linear", Call(lambda x, w: (x @ w).unsqueeze(0), 7), (7,)),
    ("normal", Call(lambda x, w: F.conv2d(x, w), 5, 3, 3, 3), (3, 7, 7)),
    ("normal", Call(lambda x, w: F.conv2d(x, w.view(5, 3, 3, 3).transpose(2, 3)), 5, 27), (3, 7, 7)),
    ("depthwise", Call(lambda x, w: sepconv.depthwise_conv2d(x, w), 3, 1, 3, 3), (3, 7, 7)),
    ("matmul", Call(lambda x, w: x.flatten(2).transpose(1, 2) @ x.flatten(2) * w, 1), (3, 5, 2)),
]


@pytest.mark.parametrize(("kind", "module", "shape"), OPERATIONS)
def test_macs_are_the_sum_of_ones(kind: str, module: nn.Module, shape: tuple[int, ...]) -> None:
    """With ones everywhere and no padding, the outputs add up to the number of products in them."""
    for p in module.parameters():
        nn.init.ones_(p)
    products = module(torch.ones(1, *shape)).sum().item()
    cost = count(module, shape)
    (row,) = [layer for layer in cost.layers if layer.macs]
    assert (row.kind, row.macs, cost.macs) == (kind, products, products)
    assert cost.params == sum(layer.params for layer in cost.layers) == sum(p.numel() for p in module.parameters())
    assert cost.conv_params == (0 if kind in ("linear", "matmul") else cost.params)


def test_padding_taps_count() -> None:
    assert count(nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 1, 1)).macs == 9


def test_rows_describe_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 5), (2, 1), padding=(1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(160, 7))
    first, last = count(model.to(torch.bfloat16), (3, 8, 5)).layers
    assert first == Layer(
        name="0",
        kind="normal",
        input_shape=(3, 8, 5),
        output_shape=(8, 4, 5),
        kernel_size=(3, 5),
        stride=(2, 1),
        params=3 * 8 * 15 + 8,
        macs=3 * 8 * 15 * 20,
        bytes=2 * (3 * 8 * 15 + 8 + 3 * 40 + 8 * 20),
        separable_params=3 * (15 + 8) + 8,
        separable_macs=3 * (15 + 8) * 20,
        ratio=pytest.approx(separable_ratio(8, (3, 5))),
    )
    assert (last.name, last.input_shape, last.output_shape, last.macs) == ("3", (160,), (7,), 1120)
    assert (last.params, last.bytes, last.ratio) == (1127, 2 * (1127 + 160 + 7), None)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_fused_layer_counts_as_its_parts(dims: int) -> None:
    separable: Any = {1: sepconv.SeparableConv1d, 2: sepconv.SeparableConv2d, 3: sepconv.SeparableConv3d}[dims]
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    fused = separable(3, 7, 3, 2, 1, depth_multiplier=2, activation="relu")
    parts = nn.Sequential(conv(3, 6, 3, 2, 1, groups=3), nn.ReLU(), conv(6, 7, 1), nn.ReLU())
    with sepconv.choices.record() as choices:
        fused(torch.zeros(1, 3, *(5,) * dims))
    assert choices[0].op == "separable_conv"
    shape = (3, *(5,) * dims)
    rows, expected = count(fused, shape).layers, count(parts, shape).layers
    assert [layer.name for layer in rows] == ["depthwise", "pointwise"]
    assert [dataclasses.replace(layer, name="") for layer in rows] == [
        dataclasses.replace(layer, name="") for layer in expected
    ]
    assert rows[1].ratio == pytest.approx(separable_ratio(7, (3,) * dims, 2), rel=1e-12)


def test_a_pair_is_found_behind_norm_activation_and_squeeze_excite() -> None:
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    middle = (nn.BatchNorm2d(8), nn.SiLU(), SqueezeExcite())
    model = nn.Sequential(nn.Conv2d(8, 8, 5, groups=8), *middle, nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1))
    ratios = {layer.name: layer.ratio for layer in count(model, (8, 9, 9)).layers if layer.ratio is not None}
    assert ratios == {"4": pytest.approx(separable_ratio(16, 5))}


def test_what_runs_twice_counts_twice_but_has_its_parameters_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    cost = count(model, (4, 5, 5))
    assert (cost.params, cost.conv_params, cost.macs) == (4 * 36 + 4, 4 * 36, 2 * 4 * 36 * 25)
    assert [(layer.name, layer.params) for layer in cost.layers] == [("0", 148), ("0", 0)]


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    cost = count(nn.Sequential(first, second), (5,))
    assert (cost.params, cost.macs) == (25, 50)
    assert [(layer.name, layer.params) for layer in cost.layers] == [("0", 25), ("1", 0)]


def test_parameters_that_take_no_part_are_shown() -> None:
    model = Call(lambda x, w: x, 3)
    model.spare = nn.Conv2d(3, 5, 3, bias=False)
    cost = count(model, (3, 4, 4))
    assert (cost.params, cost.conv_params, cost.macs) == (3 + 135, 135, 0)
    assert [(layer.name, layer.kind, layer.params) for layer in cost.layers] == [
        ("", "unused", 3),
        ("spare", "unused", 135),
    ]


def test_parameters_of_other_operations() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4), nn.LayerNorm([4, 3, 3]))
    rows = [(layer.name, layer.kind, layer.params, layer.macs) for layer in count(model, (4, 3, 3)).layers]
    assert rows == [("0", "norm", 8, 0), ("1", "other", 4, 0), ("2", "norm", 72, 0)]


def test_weight_norm() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3, bias=False))
    cost = count(conv, (3, 5, 5))
    assert (cost.params, cost.conv_params, cost.macs) == (135 + 5, 135, 135 * 9)


def test_attention_and_recurrence() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    assert count(SelfAttention(), (7, 16)).macs == 7 * 4 * 16 * 16 + 2 * 7 * 7 * 16
    recurrent = count(nn.LSTM(5, 3, batch_first=True), (7, 5))
    assert recurrent.macs == 7 * 4 * 3 * (5 + 3)
    assert recurrent.params == sum(layer.params for layer in recurrent.layers)


class Restless(nn.Module):
    """Keeps tensors outside its buffers and changes itself while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = torch.full((4, 1, 1), 2.0)
        self.last: Tensor | None = None
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.last = self.norm(self.conv(x)) * self.scale.to(x.device) + torch.arange(6.0)
        self.register_buffer("late", torch.zeros(1))
        return self.last


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(Restless(), nn.Dropout()).train()
    model[0].norm.eval()
    model(torch.randn(2, 3, 8, 8))
    seen = []
    handle = model[0].conv.register_forward_hook(lambda *args: seen.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    last, hooks = model[0].last, dict(model[0].conv._forward_hooks)
    for shape in ((3, 8, 8), (5, 8, 8)):
        if shape[0] == 3:
            assert count(model, shape).macs == 4 * 27 * 36
        else:
            with pytest.raises(ValueError, match=r"layer '0\.conv'"):
                count(model, shape)
        assert [module.training for module in model.modules()] == [True, True, True, False, True]
        assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
        assert model[0].last is last
        assert model[0].calls == 1
        assert model[0].conv._forward_hooks == hooks
        assert "late" in model[0]._buffers
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert seen == [1]
    handle.remove()


def test_nothing_is_computed_or_copied() -> None:
    """Fourteen gigabytes of weights, which do not exist: a copy or a product could not be made."""
    model = nn.Conv2d(20_000, 20_000, 3, bias=False, device="meta")
    assert count(model, (20_000, 512, 512)).macs == 20_000**2 * 9 * 510**2


def test_inference_mode_and_gradients_change_nothing() -> None:
    model = MobileNetV1(0.25, num_classes=10)
    expected = count(model, (3, 32, 32))
    with torch.inference_mode():
        assert count(model, (3, 32, 32)) == expected
    assert count(model.requires_grad_(False), (3, 32, 32)) == expected
    assert count(model.half().to(memory_format=torch.channels_last), (3, 32, 32)).macs == expected.macs


def test_a_compiled_model_is_counted_without_compiling() -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("compiled")

    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), backend=refuse)
    assert count(model, (3, 5, 5)).macs == 4 * 27 * 9


class Bad(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(99, 1), nn.Linear(8, 8), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.wide(x)
        except RuntimeError:
            return self.last(self.narrow(x))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            (3, 0, 4),
            r"count: input_shape must be positive integers without the batch, got \(3, 0, 4\)",
        ),
        (nn.Conv2d(3, 4, 3), (3, 4.0, 4), r"count: input_shape must be positive integers"),
        (nn.Conv2d(3, 4, 3), 224, r"count: input_shape must be positive integers without the batch, got 224"),
        (
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3))),
            (1, 3, 8, 8),
            r"count: layer '0.0' \(Conv2d\) fails without data on an input of shape \(1, 1, 3, 8, 8\): .*"
            r"\(input_shape = \(1, 3, 8, 8\), to be given without the batch\)",
        ),
        (
            nn.Sequential(sepconv.SeparableConv2d(3, 4, 3)),
            (5, 8, 8),
            r"count: layer '0' \(SeparableConv2d\) fails .* \(1, 5, 8, 8\): separable_conv2d: depthwise_weight",
        ),
        (Bad(lambda x: x if x.sum() > 0 else -x), (3, 4, 4), r"count: Bad fails without data on an input .* meta"),
        (Catches(), (8,), r"count: layer 'last' \(Linear\) fails without data on an input of shape \(1, 8\)"),
        (nn.LazyConv2d(3, 3), (3, 4, 4), r"count: 'weight' of a lazy layer has no shape yet; run the model once"),
    ],
)
def test_errors_name_the_layer(model: nn.Module, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(model, shape)


def test_errors_of_type() -> None:
    with pytest.raises(TypeError, match=r"count: model must be a torch.nn.Module, got function"):
        count(lambda x: x, (3, 4, 4))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(TypeError, match="count: a TorchScript module cannot be observed"):
        count(nn.Sequential(torch.jit.script(nn.Linear(2, 2))), (2,))


def test_an_operation_of_ours_without_a_rule_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(counter.RULES, torch.ops.sepconv.separable_conv.default)
    with pytest.raises(ValueError, match=r"no rule for the operation sepconv\.separable_conv"):
        count(sepconv.SeparableConv2d(3, 4, 3), (3, 5, 5))


def test_cost_as_text_and_as_json() -> None:
    cost = count(sepconv.SeparableConv2d(32, 64, 3, padding=1, bias=False, norm="batch"), (32, 8, 8))
    text = str(cost).splitlines()
    assert text[2].split() == ["pointwise", "pointwise", "32x8x8", "64x8x8", "2,048", "131,072", "0.127"]
    assert text[-1] == "2,528 parameters (2,336 convolution weights), 149,504 MACs, 50,304 bytes"
    assert json.loads(json.dumps(dataclasses.asdict(cost)))["layers"][0]["kernel_size"] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "ratio"),
    [((512, 3), 1 / 512 + 1 / 9), ((64, (1, 7)), 1 / 64 + 1 / 7), ((64, (3, 3, 3), 4), 4 * (1 / 64 + 1 / 27))],
)
def test_separable_ratio(arguments: tuple[Any, ...], ratio: float) -> None:
    assert separable_ratio(*arguments) == pytest.approx(ratio, rel=1e-15)


@pytest.mark.parametrize("arguments", [(0, 3), (8, 0), (8, (3, 0)), (8, (-3, -3)), (8, 3, 0)])
def test_separable_ratio_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(
        ValueError, match="separable_ratio: out_channels, kernel_size and depth_multiplier must be positive"
    ):
        separable_ratio(*arguments)


def test_ratio_of_whole_networks_is_between_the_filters_and_one() -> None:
    cost = count(MobileNetV1Normal(0.25), (3, 64, 64))
    ratios = [layer.ratio for layer in cost.layers if layer.kind == "normal"]
    assert len(ratios) == 14
    assert all(ratio is not None and 1 / 9 < ratio < 1 for ratio in ratios)
    assert math.isclose(ratios[-1] or 0, separable_ratio(256, 3))
