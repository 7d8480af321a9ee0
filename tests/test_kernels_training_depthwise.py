"""Depthwise stages by Halide, in one pass each way, against float64 autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage_checks import Truth, by, channels_last, geometry, relative, single, truth, with_threads
from torch import Tensor

from sepconv.activations import NAMES
from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule import training as schedule
from sepconv.kernels.halide.training import slopes
from sepconv.kernels.prologue import Deviation, Need, StageGradients, StageOutput
from sepconv.kernels.torch import stages as by_torch

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")

# Rounding of float32 over a few thousand terms; of bfloat16 one rounding of what is read and one of what is written.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
NO_BIAS = (True, True, False)


def _check_forward(found: StageOutput, t: Truth, tolerance: float) -> None:
    assert found.mean is not None
    assert found.var is not None
    assert relative(found.y, t.y) < tolerance
    assert relative(found.mean, t.mean) < tolerance
    assert relative(found.var, t.var) < 3 * tolerance


def _check_gradients(found: StageGradients, t: Truth, tolerance: float) -> None:
    names = {"x": found.x, "weight": found.weight, "bias": found.bias, "shift": found.sum, "scale": found.deviation}
    for name, gradient in names.items():
        if name in t.gradients:
            assert gradient is not None, name
            assert relative(gradient, t.gradients[name]) < tolerance, name
        else:
            assert gradient is None, name


def _stage(
    monkeypatch: pytest.MonkeyPatch, x: Tensor, weight: Tensor, way: Geometry, activation: str | None, bias: bool
) -> None:
    t = truth(x, activation, weight, torch.randn(x.shape[1]) if bias else None, way, x.dtype)
    forward = (x, single(t.prologue), weight, t.bias, way, True)
    found, choice = by(monkeypatch, stages.depthwise_stage, *forward)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    _check_forward(found, t, TOLERANCE[x.dtype])
    deviation = Deviation(t.deviation.y.to(x.dtype), *[v.float() for v in t.deviation[1:]])
    need = (True, True, bias)
    given = (t.grad, deviation, x, single(t.prologue), weight, way, need)
    gradients, choice = by(monkeypatch, stages.depthwise_stage_gradients, *given)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    _check_gradients(gradients, t, TOLERANCE[x.dtype])


CASES = [
    ((2, 16, 13, 11), 3, geometry()),
    ((3, 48, 17, 19), 3, geometry(2)),
    ((2, 32, 12, 7), 5, geometry(2, 2)),
    ((1, 24, 9, 23), 7, geometry(1, 3)),
    ((2, 13, 15, 13), 3, geometry(1, 2, 2)),
    ((2, 67, 9, 10), 3, geometry(2)),
    ((2, 134, 7, 8), 3, geometry()),
    ((2, 5, 6, 7), 3, geometry()),
    ((2, 16, 11, 10), 5, geometry(2, 3, 3)),
    ((2, 16, 8, 8), 3, geometry(1, 0)),
    ((2, 16, 5, 6), 3, geometry(1, 4)),
    ((2, 16, 1, 1), 3, geometry(2, 1)),
]


@pytest.mark.parametrize(("size", "kernel", "way"), CASES)
def test_a_stage_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], kernel: int, way: Geometry
) -> None:
    _stage(monkeypatch, channels_last(*size), torch.randn(size[1], 1, kernel, kernel), way, "relu6", bias=False)


@pytest.mark.parametrize("way", [geometry(), geometry(2)])
def test_in_bfloat16(monkeypatch: pytest.MonkeyPatch, way: Geometry) -> None:
    x = channels_last(3, 48, 17, 19, dtype=torch.bfloat16)
    _stage(monkeypatch, x, torch.randn(48, 1, 3, 3), way, "relu6", bias=True)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_prologues(monkeypatch: pytest.MonkeyPatch, activation: str | None) -> None:
    _stage(monkeypatch, channels_last(2, 16, 13, 11), torch.randn(16, 1, 3, 3), geometry(), activation, bias=True)


def test_one_image_in_many_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    _stage(monkeypatch, channels_last(1, 64, 67, 31), torch.randn(64, 1, 3, 3), geometry(2), "relu6", bias=False)


@pytest.mark.parametrize(
    "need", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_is_needed(monkeypatch: pytest.MonkeyPatch, need: Need) -> None:
    x, weight, way = channels_last(2, 16, 7, 9), torch.randn(16, 1, 3, 3), geometry()
    t = truth(x, "relu6", weight, torch.zeros(16), way, x.dtype)
    deviation = Deviation(*[vector.float() for vector in t.deviation])
    given = (t.grad, deviation, x, single(t.prologue), weight, way, need)
    found, choice = by(monkeypatch, stages.depthwise_stage_gradients, *given)
    assert choice.backend.name == "halide"
    wanted = {"x": need[0], "shift": need[0], "scale": need[0], "weight": need[1], "bias": need[2]}
    t.gradients = {name: gradient for name, gradient in t.gradients.items() if wanted.get(name)}
    _check_gradients(found, t, TOLERANCE[x.dtype])


def test_padding_differs_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorFlow pads, at stride 2."""
    x, weight = channels_last(2, 16, 12, 10), torch.randn(16, 1, 3, 3)
    way = Geometry((2, 2), ((0, 1), (0, 1)), (1, 1))
    forward, choice = by(monkeypatch, stages.depthwise_stage, x, None, weight, None, way, True)
    assert choice.backend.name == "halide"
    true = by_torch.convolution(x.double(), None, weight.double(), None, way, True)
    assert relative(forward.y, true.y) < TOLERANCE[x.dtype]
    grad = torch.randn_like(forward.y)
    found, choice = by(monkeypatch, stages.depthwise_stage_gradients, grad, None, x, None, weight, way, NO_BIAS)
    assert choice.backend.name == "halide"
    gradients = by_torch.convolution_gradients(grad.double(), None, x.double(), None, weight.double(), way, NO_BIAS)
    assert gradients.x is not None
    assert gradients.weight is not None
    assert relative(found.x, gradients.x) < TOLERANCE[x.dtype]
    assert relative(found.weight, gradients.weight) < TOLERANCE[x.dtype]


def test_statistics_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter of one 1 leaves an image at 10000 of deviation 1 as it is."""
    x, weight = channels_last(5, 16, 37, 41) + 1e4, torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    found, choice = by(monkeypatch, stages.depthwise_stage, x, None, weight, None, geometry(), True)
    assert choice.backend.name == "halide"
    assert torch.equal(found.y, x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative(found.var, var) < 1e-4
    assert float((found.mean.double() - mean).abs().max()) < 2e-3


def test_statistics_of_a_first_row_unlike_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares are taken around its mean: they are at most as many times as large as a strip has rows."""
    x, weight = channels_last(2, 16, 37, 41), torch.zeros(16, 1, 3, 3)
    x[:, :, 0] += 1e3
    weight[:, :, 1, 1] = 1.0
    found, choice = by(monkeypatch, stages.depthwise_stage, x, None, weight, None, geometry(), True)
    assert choice.backend.name == "halide"
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative(found.mean, mean) < 1e-5
    assert relative(found.var, var) < 37 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["sse41", "avx2", "avx512", "neon"])
@pytest.mark.parametrize("vectors", [1, 3, 7, 12, 16])
def test_sums_stay_in_registers(name: str, vectors: int) -> None:
    processor = machine.named(name)
    together = schedule.vectors_summed(vectors * processor.lanes, processor.lanes, processor)
    assert vectors % together == 0
    assert 2 * together + 3 <= processor.registers  # two sums each, what is read, and their mean


def test_of_a_small_cache_half_is_taken() -> None:
    small = replace(machine.named("avx2"), l2_bytes=512 * 1024)
    large = replace(machine.named("avx512"), l2_bytes=2048 * 1024)
    row = 4 * 174  # of 56 pixels, the gradients' tiles
    assert schedule.strips(128, 8, 56, row, small) == schedule.Strips(2, 128, 8)
    assert schedule.strips(128, 8, 56, row, large) == schedule.Strips(5, 128, 16)


def test_images_that_lie_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels of a wider image are read in place; a gradient that was spread or transposed is copied."""
    wide, weight = channels_last(3, 40, 6, 5), torch.randn(16, 1, 3, 3)
    x, before = wide[:, 8:24], wide.clone()
    found, choice = by(monkeypatch, stages.depthwise_stage, x, None, weight, None, geometry(), False)
    assert choice.backend.name == "halide"
    assert relative(found.y, by_torch.convolution(x.double(), None, weight.double(), None, geometry(), False).y) < 2e-6
    for grad in (torch.randn(3, 16, 1, 1).expand(3, 16, 6, 5), torch.randn(3, 16, 6, 5)):
        given = (None, x, None, weight, geometry(), NO_BIAS)
        gradients, choice = by(monkeypatch, stages.depthwise_stage_gradients, grad, *given)
        assert choice.backend.name == "halide"
        true = by_torch.convolution_gradients(grad.double(), None, x.double(), None, weight.double(), *given[4:])
        assert true.x is not None
        assert relative(gradients.x, true.x) < TOLERANCE[x.dtype]
    assert torch.equal(wide, before)


@pytest.mark.parametrize(
    ("x", "weight", "way", "reason"),
    [
        (torch.randn(2, 16, 9, 9), torch.randn(16, 1, 3, 3), geometry(), "channels_last"),
        (channels_last(2, 16, 9, 9), torch.randn(32, 1, 3, 3), geometry(), "one filter per channel"),
        (channels_last(2, 16, 9, 9), torch.randn(16, 1, 3, 3), geometry(3), "strides up to 2"),
        (channels_last(2, 16, 19, 19), torch.randn(16, 1, 17, 17), geometry(1, 8), "filters up to 15"),
        (channels_last(2, 3, 9, 9), torch.randn(3, 1, 3, 3), geometry(), "4 channels or more"),
        (channels_last(2, 16, 9, 9, dtype=torch.float64), torch.randn(16, 1, 3, 3).double(), geometry(), "float64"),
    ],
)
def test_why_not(monkeypatch: pytest.MonkeyPatch, x: Tensor, weight: Tensor, way: Geometry, reason: str) -> None:
    forward, choice = by(monkeypatch, stages.depthwise_stage, x, None, weight, None, way, True)
    assert choice.backend.name == "torch"
    assert reason in choice.reasons["halide"]
    given = (torch.randn_like(forward.y), None, x, None, weight, way, NO_BIAS)
    _, choice = by(monkeypatch, stages.depthwise_stage_gradients, *given)
    assert choice.backend.name == "torch"
    assert reason in choice.reasons["halide"]


def test_an_activation_without_derivative_in_halide(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = channels_last(2, 16, 5, 5), torch.randn(16, 1, 3, 3)
    [unknown, *_] = [name for name in NAMES if slopes.missing(name)]
    t = truth(x, unknown, weight, None, geometry(), x.dtype)
    given = (t.grad, None, x, single(t.prologue), weight, geometry(), NO_BIAS)
    _, choice = by(monkeypatch, stages.depthwise_stage_gradients, *given)
    assert choice.backend.name == "torch"
    assert "no derivative" in choice.reasons["halide"]


@pytest.mark.parametrize("way", [geometry(), geometry(2)])
def test_nothing_depends_on_threads(way: Geometry) -> None:
    x, weight = channels_last(3, 48, 17, 19), torch.randn(48, 1, 3, 3)
    t = truth(x, "relu6", weight, None, way, x.dtype)
    prologue, deviation = single(t.prologue), Deviation(*[vector.float() for vector in t.deviation])

    def both() -> list[Tensor]:
        forward = stages.depthwise_stage(x, prologue, weight, None, way, True)
        back = stages.depthwise_stage_gradients(t.grad, deviation, x, prologue, weight, way, NO_BIAS)
        return [tensor for tensor in (*forward, *back) if tensor is not None]

    first, *others = with_threads((1, 2, 2), both)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
