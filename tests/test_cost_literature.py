"""Counts of whole networks against the papers' tables, the frameworks' documentation and formulas."""

from __future__ import annotations

import pytest
from torch import nn

import sepconv
from sepconv.cost import count
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
