"""Depthwise stages by Halide, in one pass each way, against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_checks import Truth, geometry, relative, single, truth
from torch import Tensor

from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.prologue import Deviation, StageGradients, StageOutput
from sepconv.kernels.stages import StageChoice

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")

# Rounding of float32 over a few thousand terms; of bfloat16 one rounding of what is read and one of what is written.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
ALL = (True, True, True)


def _image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)


def _by(monkeypatch: pytest.MonkeyPatch, call: Any, *given: Any) -> tuple[Any, StageChoice]:
    """The result, and who computed it; what is not written stays NaN."""
    seen: list[StageChoice] = []
    token = stages.watcher.set(seen.append)
    empty = torch.empty
    try:
        monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
        result = call(*given)
    finally:
        monkeypatch.setattr(torch, "empty", empty)
        stages.watcher.reset(token)
    [choice] = seen
    return result, choice


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
    found, choice = _by(monkeypatch, stages.depthwise_stage, *forward)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    _check_forward(found, t, TOLERANCE[x.dtype])
    deviation = Deviation(t.deviation.y.to(x.dtype), *[v.float() for v in t.deviation[1:]])
    need = (True, True, bias)
    given = (t.grad, deviation, x, single(t.prologue), weight, way, need)
    gradients, choice = _by(monkeypatch, stages.depthwise_stage_gradients, *given)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    _check_gradients(gradients, t, TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "kernel", "way"),
    [
        ((2, 16, 13, 11), 3, geometry()),
        ((3, 48, 17, 19), 3, geometry(2)),
        ((2, 32, 12, 7), 5, geometry(2, 2)),
        ((1, 24, 9, 23), 7, geometry(1, 3)),
        ((2, 12, 15, 13), 3, geometry(1, 2, 2)),
        ((2, 16, 11, 10), 5, geometry(2, 3, 3)),
        ((2, 16, 8, 8), 3, geometry(1, 0)),
        ((2, 16, 5, 6), 3, geometry(1, 4)),
        ((2, 16, 1, 1), 3, geometry(2, 1)),
    ],
)
def test_a_stage_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: tuple[int, ...], kernel: int, way: Geometry
) -> None:
    _stage(monkeypatch, _image(*size, dtype=dtype), torch.randn(size[1], 1, kernel, kernel), way, "relu6", False)
