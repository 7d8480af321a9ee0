"""LayerNorm over channels and its gradients by Halide, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from stage_checks import by, channels_last, relative, with_threads
from torch import Tensor
from torch.nn import functional as F

from sepconv.kernels import stages
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.training import layer_norm_calls

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")

EPS = 1e-6
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
SIZES = [(2, 96, 5, 7), (3, 16, 11, 9), (1, 4, 1, 3), (2, 257, 3, 5), (2, 67, 4, 5), (1, 5, 1, 131), (1, 24, 1, 1)]


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm_calls, "_LEAST_NUMBERS", 0)
    stages.forget()


def _truth(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of x, bias and weight."""
    given = [None if t is None else t.double().clone().requires_grad_() for t in (x, bias, weight)]
    image, shift, factor = given
    assert image is not None
    y = F.layer_norm(image.movedim(1, -1), x.shape[1:2], factor, shift, EPS).movedim(-1, 1)
    y.backward(grad.double())
    return [y.detach(), *[t.grad for t in given if t is not None and t.grad is not None]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_back(monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w = size
    x = torch.randn(n, h, w, c + 6).to(dtype).permute(0, 3, 1, 2)[:, 2 : 2 + c]  # channels of a larger image
    grad, weight, bias = channels_last(*size, dtype=dtype), torch.randn(c), torch.randn(c)
    truth = _truth(x, weight, bias, grad)
    y, choice = by(monkeypatch, stages.layer_norm, x, weight, bias, EPS)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    found, choice = by(monkeypatch, stages.layer_norm_gradients, grad, x, weight, EPS)
    assert (choice.backend.name, choice.reasons) == ("halide", {})
    for value, true in zip((y, *found), truth, strict=True):
        assert relative(value, true) < TOLERANCE[dtype]


def test_without_weight_and_bias() -> None:
    x, grad = channels_last(2, 24, 5, 7), channels_last(2, 24, 5, 7)
    truth = _truth(x, None, None, grad)
    assert relative(stages.layer_norm(x, None, None, EPS), truth[0]) < TOLERANCE[torch.float32]
    assert relative(stages.layer_norm_gradients(grad, x, None, EPS).x, truth[1]) < TOLERANCE[torch.float32]


def test_far_from_zero() -> None:
    """A mean of 1e4 with deviation 1: squares of values would keep no digit of the variance."""
    x, grad = channels_last(2, 64, 9, 11) + 1e4, channels_last(2, 64, 9, 11)
    truth = _truth(x, None, None, grad)
    bound = 64 * 1e4 * 2**-24  # what the rounded mean moves
    assert relative(stages.layer_norm(x, None, None, EPS), truth[0]) < bound
    assert relative(stages.layer_norm_gradients(grad, x, None, EPS).x, truth[1]) < bound


def test_pytorchs_gradients_are_those_of_autograd() -> None:
    x, grad = torch.randn(2, 7, 3, 5).double(), torch.randn(2, 7, 3, 5).double()
    weight, bias = torch.randn(7).double(), torch.randn(7).double()
    truth = _truth(x, weight, bias, grad)
    found, y = stages.layer_norm_gradients(grad, x, weight, EPS), stages.layer_norm(x, weight, bias, EPS)
    for value, true in zip((y, *found), truth, strict=True):
        assert relative(value, true) < 1e-12


def test_sums_do_not_depend_on_threads() -> None:
    x, grad, weight = channels_last(5, 32, 23, 19), channels_last(5, 32, 23, 19), torch.randn(32)
    first, second, again = with_threads(
        (1, 2, 2),
        lambda: [*stages.layer_norm_gradients(grad, x, weight, EPS), stages.layer_norm(x, weight, None, EPS)],
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))


def test_small_ones_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    stages.forget()
    choice = stages.layer_norm_choice(channels_last(2, 24, 5, 7), EPS)
    assert choice.backend.name == "torch"
    assert "1,680 numbers are too few" in choice.reasons["halide"]
