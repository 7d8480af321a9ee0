"""Normalising, its gradients and statistics by Halide, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from stage_checks import by, channels_last, prologue_of, relative, single, with_threads
from torch import Tensor

from sepconv.activations import NAMES
from sepconv.kernels import stages
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.training import slopes
from sepconv.kernels.prologue import Prologue
from sepconv.kernels.torch import stages as true

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
SIZES = [(2, 16, 5, 7), (3, 24, 11, 9), (1, 4, 1, 3), (5, 144, 6, 6), (2, 1024, 3, 5), (2, 67, 4, 5), (2, 5, 6, 7)]


def _prologue(x: Tensor, activation: str) -> Prologue:
    channels = x.shape[1]
    made = single(prologue_of(x.float(), torch.rand(channels) + 0.5, torch.randn(channels), activation))
    assert made is not None
    return made


def _double(prologue: Prologue) -> Prologue:
    return Prologue(*[vector.double() for vector in prologue[:3]], prologue.activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_finish_and_back(monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, grad = (channels_last(*size, dtype=dtype) for _ in range(3))
    prologue = _prologue(x, "hardswish")
    for given in ((x, prologue, residual), (x, prologue)):
        out, choice = by(monkeypatch, stages.finish, *given)
        assert (choice.backend.name, choice.reasons) == ("halide", {})
        truth = true.finish(x.double(), _double(prologue), *[image.double() for image in given[2:]])
        assert relative(out, truth) < TOLERANCE[dtype]
    found, choice = by(monkeypatch, stages.finish_gradients, grad, x, prologue)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    for gradient, truth in zip(found, true.finish_gradients(grad.double(), x.double(), _double(prologue)), strict=True):
        assert relative(gradient, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", [name for name in ("", *NAMES) if not slopes.missing(name)])
def test_every_derivative(activation: str) -> None:
    x, grad = channels_last(2, 16, 5, 7), channels_last(2, 16, 5, 7)
    prologue = _prologue(x, activation)
    found = stages.finish_gradients(grad, x, prologue)
    truth = true.finish_gradients(grad.double(), x.double(), _double(prologue))
    assert relative(found.x, truth.x) < TOLERANCE[torch.float32]
    assert relative(found.deviation, truth.deviation) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_statistics(monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = channels_last(*size, dtype=dtype)
    (mean, var), choice = by(monkeypatch, stages.statistics, x)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative(var, truth[0]) < TOLERANCE[torch.float32]
    assert relative(mean, truth[1]) < TOLERANCE[torch.float32]


def test_statistics_far_from_zero() -> None:
    """Of deviation 1 at 10000, where the rounding of a run's mean is 5e-4."""
    x = (torch.randn(7, 16, 37, 41) + 1e4).contiguous(memory_format=torch.channels_last)
    mean, var = stages.statistics(x)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative(var, truth[0]) < 1e-4
    assert float((mean.double() - truth[1]).abs().max()) < 2e-3


def test_nan_and_infinity_go_where_they_go_in_pytorch() -> None:
    x = channels_last(1, 16, 4, 4)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = torch.nan, torch.inf
    prologue = Prologue(torch.zeros(16), torch.ones(16), torch.zeros(16), "relu6")
    assert torch.equal(stages.finish(x, prologue).nan_to_num(7), true.finish(x, prologue).nan_to_num(7))
    found, truth = (of(torch.ones_like(x), x, prologue) for of in (stages.finish_gradients, true.finish_gradients))
    assert torch.equal(found.x.nan_to_num(7), truth.x.nan_to_num(7))


def test_views_are_read_in_place_and_others_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = channels_last(3, 40, 6, 5)
    x = wide[:, 8:24]
    prologue, before = _prologue(x, "relu"), wide.clone()
    found, choice = by(monkeypatch, stages.finish, x, prologue)
    assert choice.backend.name == "halide"
    assert relative(found, true.finish(x.double(), _double(prologue))) < TOLERANCE[torch.float32]
    assert torch.equal(wide, before)
    spread = torch.randn(3, 16, 1, 1).expand(3, 16, 6, 5)
    for grad in (spread, torch.randn(3, 16, 6, 5), wide[:, ::2][:, :16]):
        gradients, choice = by(monkeypatch, stages.finish_gradients, grad, x, prologue)
        assert choice.backend.name == "halide"
        truth = true.finish_gradients(grad.double(), x.double(), _double(prologue))
        assert relative(gradients.x, truth.x) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(2, 16, 5, 5), "channels_last"),
        (channels_last(2, 3, 5, 5), "4 channels or more, got 3"),
        (channels_last(2, 16, 5, 5, dtype=torch.float64), "float64"),
        (torch.randn(2, 16, 5), "channels_last"),
    ],
)
def test_why_not(monkeypatch: pytest.MonkeyPatch, x: Tensor, reason: str) -> None:
    _, choice = by(monkeypatch, stages.statistics, x)
    assert choice.backend.name == "torch"
    assert reason in choice.reasons["halide"]


def test_sums_do_not_depend_on_threads() -> None:
    x, grad = channels_last(5, 32, 23, 19), channels_last(5, 32, 23, 19)
    prologue = _prologue(x, "relu6")
    first, second, again = with_threads(
        (1, 2, 2), lambda: [*stages.finish_gradients(grad, x, prologue), *stages.statistics(x)]
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
