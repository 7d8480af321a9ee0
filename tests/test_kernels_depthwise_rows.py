"""Rows longer than the cache: what the depthwise kernels copy grows with the image, and where it would not, PyTorch's
kernel is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from kernel_checks import depthwise_case
from test_kernels_depthwise import test_forward_is_the_reference as check_forward
from test_kernels_depthwise import test_gradients_are_the_reference as check_gradients

import sepconv
from sepconv.kernels.halide.conv import depthwise_gather, depthwise_plan, depthwise_weight_grad
from sepconv.kernels.halide.conv.depthwise_gather import GatherSpec
from sepconv.kernels.halide.conv.depthwise_taps import forward_taps
from sepconv.kernels.halide.conv.depthwise_weight_grad import WeightSpec
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import depthwise as schedule

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

_ONE = (1, 1, 1)


def _gather(columns: int, boxes: int) -> tuple[Any, list[Any], Any]:
    """The pipeline with arguments of ones, what must be kept alive with it, and room for the result."""
    tile = schedule.GatherTile(lanes=8, block=1, columns=8, rows=1, unrolled_taps=9)
    taps = tuple([forward_taps(size, 1) for size in (3, 1, 1)])
    spec = GatherSpec(1, False, False, taps, _ONE, 1, False, "", tile, cut_rows=True)
    out, arguments = depthwise_gather.build(spec)
    source, weight, bias, base, box, items, planes = arguments
    held = [np.ones(shape, np.float32) for shape in ((1, 1, 1, 1, 1, columns), (1, 1, 1, 1, 3), (1, 1))]
    for parameter, values in zip((source, weight, bias), held, strict=True):
        parameter.set(hl.Buffer(values))
    for parameter, value in ((base, -1), (box, boxes), (items, 1), (planes, 1)):
        parameter.set(value)
    return out, held, np.zeros((1, 1, 1, 1, 1, columns), np.float32)


def _weight_gradient(columns: int, boxes: int) -> tuple[Any, list[Any], Any]:
    tile = schedule.WeightTile(lanes=8, block=1, taps_x=3, taps_y=1, columns=1, rows=1)
    spec = WeightSpec(1, False, (3, 1, 1), _ONE, _ONE, 1, tile, cut_rows=True)
    out, arguments = depthwise_weight_grad.build(spec)
    source, grad, base, *loops = arguments
    held = [np.ones((1, 1, 1, 1, 1, columns), np.float32)]
    for parameter in (source, grad):
        parameter.set(hl.Buffer(held[0]))
    base.set(-1)
    for parameter, value in zip(loops, (8 * boxes, 1, 1, 1, 1, 1, 1), strict=True):
        parameter.set(value)
    return out, held, np.zeros((1, 1, 1, 1, 3), np.float32)


@pytest.mark.parametrize("make", [_gather, _weight_gradient])
def test_what_is_copied_grows_with_the_row(make: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    """A tile took its part of a row and the whole row was copied for it: a quadratic number of stores."""
    target = hl.get_jit_target_from_environment().with_feature(hl.TargetFeature.TraceStores)
    stores = []
    for columns in (128, 1024):
        out, _held, result = make(columns, boxes=2)
        out.realize(hl.Buffer(result), target)
        stores.append(capfd.readouterr().out.count("Store padded"))
        assert result.sum() == 3 * columns - 2
    assert 0 < stores[1] <= 8 * stores[0]


@pytest.mark.parametrize("which", ["forward", "grad_input", "grad_weight"])
def test_only_rows_of_several_boxes_are_cut(which: str) -> None:
    for columns, cut in ((100, False), (2**23, True)):
        signal, weight = torch.empty(1, 1, columns, device="meta"), torch.empty(1, 1, 3, device="meta")
        second, size = (signal, weight.shape) if which == "grad_weight" else (weight, signal.shape)
        found = depthwise_plan.plan(depthwise_case(which, signal, second, (1,), ((1, 1),), (1,), size=size))
        assert f"cut_rows={cut}" in found.key
        assert depthwise_plan.copied(found.problem) < 1.1


@pytest.fixture
def _small_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of a single register tile, as if the cache were tiny."""

    def weight_boxes(shape: Any, tile: Any, channels_last: bool, machine: Any) -> schedule.WeightBoxes:
        rows = schedule.ceil_div(shape.image[1], tile.rows)
        return schedule.WeightBoxes(tile.lanes, tile.rows, 1, 1, rows, shape.batch)

    monkeypatch.setattr(schedule, "gather_boxes", lambda *_: _ONE)
    monkeypatch.setattr(schedule, "weight_boxes", weight_boxes)


_WIDE = [
    Case("wide_stride_2", 3, (5, 61), (3, 5), stride=2, padding=3, multiplier=2),
    Case("wide_dilation", 2, (5, 71), (3, 3), padding=(2, 7), dilation=(2, 7)),
    Case("wide_signal", 2, (203,), (4,), padding=40),
]


@pytest.mark.usefixtures("_small_boxes")
@pytest.mark.parametrize("how", ["contiguous", "sliced"])
@pytest.mark.parametrize("case", _WIDE, ids=lambda case: case.name)
def test_cut_rows_are_the_reference(case: Case, how: str, assert_rounding: Callable[..., None]) -> None:
    check_forward(case, how, assert_rounding)
    check_gradients(case, how, assert_rounding)


def _reasons(shape: tuple[int, ...], weight: tuple[int, ...], *walk: Any, channels_last: bool = False) -> list[str]:
    """Why our kernel computes neither of the three passes: empty where it does."""
    dims = len(shape) - 2
    function = {1: sepconv.depthwise_conv1d, 2: sepconv.depthwise_conv2d}[dims]
    x = torch.zeros(shape)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    w = torch.zeros(weight, requires_grad=True)

    def both() -> None:
        y = function(x, w, None, *walk)
        y.backward(torch.zeros_like(y))

    return [choice.reasons.get("halide", "") for choice in sepconv.explain(both)]


def test_taps_far_apart_go_to_pytorch() -> None:
    for shape, weight, walk in (
        ((1, 1, 2**20), (1, 1, 3), (1, 0, 2**18)),
        ((1, 1, 1200, 1200), (1, 1, 3, 3), (1, 400, 400)),
        ((1, 1, 2**18), (1, 1, 3), (1000,)),
    ):
        reasons = _reasons(shape, weight, *walk)
        assert len(reasons) == 3
        assert "taps lie so far apart that" in reasons[0]
        assert all("taps lie so far apart" in reason or "remainders of the stride" in reason for reason in reasons)
    assert _reasons((1, 1, 2**12), (1, 1, 3), 1, 0, 64) == ["", "", ""]


def test_what_would_compile_for_minutes_goes_to_pytorch() -> None:
    assert "each of the 4096 remainders of the stride" in _reasons((1, 2, 130, 130), (2, 1, 3, 3), 64)[1]
    assert "of the stride along a row would be code" in _reasons((1, 2, 200), (2, 1, 3), 9)[2]
    filters = _reasons((1, 4, 9, 9), (256, 1, 3, 3), channels_last=True)
    assert ["each of the 64 filters of a channel" in reason for reason in filters] == [True] * 3
    assert _reasons((1, 4, 9, 9), (256, 1, 3, 3)) == ["", "", ""]


def test_many_images_of_few_pixels_go_to_pytorch() -> None:
    for shape, weight in (((1, 256, 1, 1), (256, 1, 3, 3)), ((1, 256, 64, 2), (256, 1, 3, 3))):
        assert "rows of" in _reasons(shape, weight, 1, 1)[0]
    assert "PyTorch has a grad_weight kernel" in _reasons((2, 256, 2), (256, 1, 3), 1, 1)[2]
    assert _reasons((1, 8, 64, 2), (8, 1, 3, 3), 1, 1)[0] == ""
