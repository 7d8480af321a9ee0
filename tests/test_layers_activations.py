"""Activations with no norm in front of them, between convolutions that wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from trainable import Branch, Residual, always, assert_as_exact, gradients, images, ours

import sepconv
from sepconv.kernels.halide.jit import products, runtime
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.training import blocks, pointwise
from sepconv.ops import postpone, stages

__all__ = ["always"]


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postpone, "_LEAST_ALONE", 0)


def _penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a gradient."""
    x = x.clone().requires_grad_()
    [grad] = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _block(*between: nn.Module, last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), *between, last or nn.Conv2d(8, 3, 1))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "GELU": lambda: _block(nn.GELU()),
    "GELU by tanh": lambda: _block(nn.GELU("tanh")),
    "SiLU": lambda: _block(nn.SiLU()),
    "ReLU in place": lambda: _block(nn.ReLU(inplace=True)),
    "no derivative": lambda: _block(nn.Mish()),
    "two": lambda: _block(nn.ReLU(), nn.Sigmoid()),
    "norm behind": lambda: _block(nn.GELU(), nn.BatchNorm2d(8)),
    "norm and activation behind": lambda: _block(nn.GELU(), nn.BatchNorm2d(8), nn.ReLU()),
    "norm around": lambda: nn.Sequential(_block(nn.GELU()), nn.BatchNorm2d(3), nn.ReLU(), _block(nn.GELU())),
    "before a depthwise one": lambda: _block(nn.GELU(), last=nn.Conv2d(8, 8, 3, groups=8)),
    "before a normal one": lambda: _block(nn.GELU(), last=nn.Conv2d(8, 4, 3)),
    "residual": lambda: Residual(_block(nn.GELU())),
    "residual in the middle": lambda: _block(nn.GELU(), Residual(nn.Conv2d(8, 8, 1))),
    "used twice": lambda: _block(nn.GELU(), Branch(lambda x: x * x.mean())),
    "gated": lambda: _block(Branch(lambda x: x * torch.sigmoid(x))),
    "at the end": lambda: _block(nn.GELU(), last=nn.Identity()),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", BLOCKS)
def test_as_in_pytorch(name: str) -> None:
    assert_as_exact(BLOCKS[name](), images(), gradients)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["GELU", "SiLU", "norm around"])
def test_gradients_of_gradients(name: str) -> None:
    assert_as_exact(BLOCKS[name](), images(), _penalty)


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")
def test_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage with the activation in its passes, forward and back; none for the images that are too small."""
    monkeypatch.setattr(blocks, "_LEAST_NUMBERS", 0)
    model, x = BLOCKS["GELU"](), images(2, (16, 16))
    for least, expected in ((0, {"pointwise_stage": "halide", "pointwise_stage_gradients": "halide"}), (1 << 20, {})):
        monkeypatch.setattr(postpone, "_LEAST_ALONE", least)
        replaced, _ = ours(model)
        with sepconv.ops.explain.record() as choices:
            gradients(replaced, x)
        assert {choice.op: choice.kernel for choice in choices if "stage" in choice.op} == expected
    monkeypatch.setattr(postpone, "_LEAST_ALONE", 0)
    assert_as_exact(model, x, gradients)
    replaced, _ = ours(model)
    with torch.autocast("cpu", torch.bfloat16), sepconv.ops.explain.record() as choices:
        y, plain = replaced(x).detach(), model(x).detach()
    assert not [
        choice for choice in choices if "stage" in choice.op and choice.kernel == "halide"
    ]  # products cost more
    assert y.dtype is torch.bfloat16
    assert float((y - plain).abs().max()) <= 2**-6 * float(plain.abs().max())


@pytest.mark.skipif(bool(runtime.missing() or products.missing()), reason="no product to call")
@pytest.mark.parametrize("least", [0, 1 << 30])
def test_a_pointwise_layer_alone(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """As a stage where it is large; a bias of its own and the sum behind it are no hindrance."""
    monkeypatch.setattr(blocks, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(stages, "_LEAST_ALONE", least)
    monkeypatch.setattr(pointwise, "pays_bare", lambda: True)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), Branch(lambda x: x + 1), nn.Conv2d(8, 3, 3)), images(2, (16, 16))
    replaced, _ = ours(model)
    for _ in range(2):  # what a layer learns in its first step is not that it never pays
        with sepconv.ops.explain.record() as choices:
            gradients(replaced, x)
        ran = [(choice.op, choice.kernel) for choice in choices if choice.kernel == "halide" and "pointw" in choice.op]
        assert ran == ([] if least else [("pointwise_stage", "halide"), ("pointwise_stage_gradients", "halide")])
    assert_as_exact(model, x, gradients)


@pytest.mark.skipif(bool(runtime.missing() or products.missing()), reason="no product to call")
def test_a_depthwise_layer_does_not_take_an_activation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute it once for every tap."""
    monkeypatch.setattr(blocks, "_LEAST_NUMBERS", 0)
    replaced, _ = ours(_block(nn.GELU(), last=nn.Conv2d(8, 8, 5, groups=8)))
    with sepconv.ops.explain.record() as choices:
        gradients(replaced, images(2, (16, 16)))
    found = {choice.op for choice in choices}
    assert "depthwise_conv" in found
    assert "depthwise_stage" not in found


@pytest.mark.skipif(bool(products.missing()), reason="no product to call")
@pytest.mark.parametrize(("name", "pays"), [("avx2", False), ("avx512", True)])
def test_where_a_pointwise_layer_alone_is_pytorchs(name: str, pays: bool) -> None:
    with machine.targeting(machine.named(name)):
        assert pointwise.pays_bare() is pays
