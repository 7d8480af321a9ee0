"""Stages of training by PyTorch's operations, against float64 autograd of convolution, batch norm and activation."""

from __future__ import annotations

import pytest
import torch
from stage_checks import EPS, Truth, geometry, prologue_of, relative, truth
from torch import Tensor, nn

from sepconv.activations import ACTIVATIONS, NAMES
from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.prologue import Deviation, Prologue, StageCase, StageGradients
from sepconv.kernels.stages import BACKENDS, StageBackend, StageChoice

FLOAT64 = 1e-12
SIXTHS = 1e-7  # of hardsigmoid: PyTorch multiplies by a sixth in float32


def _in_double(t: Truth) -> tuple[Prologue | None, Deviation]:
    prologue = t.prologue and Prologue(*[v.double() for v in t.prologue[:3]], t.prologue.activation)
    return prologue, Deviation(*[v.double() for v in t.deviation])


def _compare(found: StageGradients, t: Truth, tolerance: float) -> None:
    assert found.x is not None
    assert relative(found.x, t.gradients["x"]) < tolerance
    assert found.weight is not None
    assert relative(found.weight, t.gradients["weight"]) < tolerance
    if t.bias is not None:
        assert found.bias is not None
        assert relative(found.bias, t.gradients["bias"]) < tolerance
    if t.prologue is None:
        assert found.sum is None
        assert found.deviation is None
        return
    assert found.sum is not None
    assert found.deviation is not None
    assert relative(found.sum, t.gradients["shift"]) < tolerance
    assert relative(found.deviation, t.gradients["scale"]) < tolerance
    assert relative(-t.prologue.scale * found.sum, t.gradients["mean"]) < tolerance


@pytest.mark.parametrize("activation", [None, *["", *NAMES]])
def test_a_stage_and_its_gradients_in_float64(activation: str | None) -> None:
    x = torch.randn(2, 6, 7, 5).double()
    weight, bias, way = torch.randn(12, 1, 3, 3).double(), torch.randn(12).double(), geometry(2)
    t = truth(x, activation, weight, bias, way, torch.float64)
    prologue, deviation = _in_double(t)
    found = stages.depthwise_stage(x, prologue, weight, bias, way, statistics=True)
    assert found.mean is not None
    assert found.var is not None
    for mine, true in ((found.y, t.y), (found.mean, t.mean), (found.var, t.var)):
        assert relative(mine, true) < FLOAT64
    gradients = stages.depthwise_stage_gradients(t.grad, deviation, x, prologue, weight, way, (True, True, True))
    _compare(gradients, t, SIXTHS if activation == "hardsigmoid" else FLOAT64)


def _stage(op: str, x: Tensor, weight: Tensor, way: Geometry) -> tuple[Tensor, StageGradients, Truth]:
    t = truth(x, "hardswish", weight, None, way, torch.float64)
    prologue, deviation = _in_double(t)
    need = (True, True, False)
    if op == "pointwise":
        y = stages.pointwise_stage(x, prologue, weight, None, False).y
        return y, stages.pointwise_stage_gradients(t.grad, deviation, x, prologue, weight, need), t
    y = stages.normal_stage(x, prologue, weight, None, way, False).y
    return y, stages.normal_stage_gradients(t.grad, deviation, x, prologue, weight, way, need), t


@pytest.mark.parametrize(
    ("op", "size", "way"),
    [
        ("pointwise", (5, 6, 1, 1), geometry(1, 0)),
        ("normal", (8, 3, 3, 3), geometry(2)),
        ("normal", (4, 6, 5, 5), geometry(1, 3, 2)),
    ],
)
def test_other_stages_in_float64(op: str, size: tuple[int, ...], way: Geometry) -> None:
    y, gradients, t = _stage(op, torch.randn(3, 6, 9, 8).double(), torch.randn(size).double(), way)
    assert relative(y, t.y) < FLOAT64
    assert gradients.bias is None
    _compare(gradients, t, FLOAT64)


def test_padding_may_differ_from_end_to_end() -> None:
    x, weight = torch.randn(2, 4, 6, 7).double(), torch.randn(4, 1, 3, 3).double()
    way = Geometry((2, 2), ((0, 1), (0, 1)), (1, 1))
    padded = nn.functional.pad(x, (0, 1, 0, 1)).requires_grad_()
    y = nn.functional.conv2d(padded, weight, None, 2, groups=4)
    grad = torch.randn_like(y)
    (true,) = torch.autograd.grad(y, padded, grad)
    found = stages.depthwise_stage_gradients(grad, None, x, None, weight, way, (True, False, False))
    assert found.x is not None
    assert found.weight is None
    assert found.bias is None
    assert relative(found.x, true[..., :-1, :-1]) < FLOAT64
    assert relative(stages.depthwise_stage(x, None, weight, None, way, False).y, y.detach()) < FLOAT64


@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_finish_is_batch_norm_and_activation(activation: str) -> None:
    z, residual = torch.randn(3, 5, 4, 6).double().requires_grad_(), torch.randn(3, 5, 4, 6).double()
    norm = nn.BatchNorm2d(5, eps=EPS).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    h = ACTIVATIONS[activation].function(norm(z)) + residual
    prologue = prologue_of(z.detach(), norm.weight.detach(), norm.bias.detach(), activation)
    assert relative(stages.finish(z.detach(), prologue, residual), h.detach()) < FLOAT64
    assert relative(stages.finish(z.detach(), prologue), (h - residual).detach()) < FLOAT64
    grad = torch.randn_like(h)
    h.backward(grad)
    found = stages.finish_gradients(grad, z.detach(), prologue)
    assert norm.bias.grad is not None
    assert norm.weight.grad is not None
    assert z.grad is not None
    assert relative(found.sum, norm.bias.grad) < FLOAT64
    root = prologue.scale / norm.weight.detach()
    assert relative(found.deviation * root, norm.weight.grad) < FLOAT64
    # What is missing is what came through the statistics.
    count = z.numel() / 5
    mean, var = stages.statistics(z.detach())
    of_var = found.deviation * norm.weight.detach() * -0.5 * (var + EPS) ** -1.5
    away = (z.detach() - mean[:, None, None]) * (2 * of_var / count)[:, None, None]
    through = found.x + away - (prologue.scale * found.sum / count)[:, None, None]
    assert relative(through, z.grad) < FLOAT64


def test_statistics_far_from_zero() -> None:
    x = (torch.randn(4, 3, 9, 9) + 1e4).contiguous(memory_format=torch.channels_last)
    mean, var = stages.statistics(x)
    true = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative(var, true[0]) < 1e-4
    assert relative(mean, true[1]) < 1e-6


def test_what_is_not_needed_is_not_there() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    found = stages.depthwise_stage_gradients(x, None, x, None, weight, geometry(), (False, True, False))
    assert [gradient is None for gradient in found] == [True, True, True, False, True]
    assert stages.depthwise_stage(x, None, weight, None, geometry(), False)[1:] == (None, None)


def test_bfloat16_keeps_its_numbers_and_layout() -> None:
    x = torch.randn(2, 8, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 1, 3, 3)
    t = truth(x, "relu6", weight, None, geometry(), torch.bfloat16)
    found = stages.depthwise_stage(x, t.prologue, weight, None, geometry(), True)
    assert found.y.dtype is torch.bfloat16
    assert found.y.is_contiguous(memory_format=torch.channels_last)
    assert found.mean is not None
    assert found.mean.dtype is torch.float32
    assert relative(found.y, t.y) < 2**-6


def _refused(reason: str) -> StageBackend:
    def prepare(case: StageCase) -> object:
        raise AssertionError(case)

    return StageBackend("other", prepare, supports=lambda case: reason)  # type: ignore[arg-type]


def test_a_choice_keeps_the_reasons_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_only = BACKENDS["statistics", "forward"][-1:]
    monkeypatch.setitem(BACKENDS, ("statistics", "forward"), [_refused("not today"), *torch_only])
    stages.forget()
    seen: list[StageChoice] = []
    token = stages.watcher.set(seen.append)
    try:
        stages.statistics(torch.randn(2, 3, 4, 4))
    finally:
        stages.watcher.reset(token)
        stages.forget()
    [choice] = seen
    assert choice.backend.name == "torch"
    assert choice.reasons == {"other": "not today"}
    assert choice.case.op == "statistics"
