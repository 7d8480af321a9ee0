"""LayerNorm in networks that train with our layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from trainable import always, assert_as_exact, gradients, images, ours

import sepconv
from sepconv.kernels import stages
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.training import layer_norm_calls
from sepconv.layers.training import LayerNorm
from sepconv.ops import layer_norm

__all__ = ["always"]


class Block(nn.Module):
    """ConvNeXt's: depthwise, LayerNorm of pixels, pointwise to more channels and back."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(3, 12, 5, padding=2), norm or nn.LayerNorm(12, eps=1e-6)
        self.expand, self.activation, self.project = nn.Conv2d(12, 20, 1), nn.GELU(), nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = x + self.project(self.activation(self.expand(y)))
        return out


@pytest.fixture
def ours_always(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm, "unpaid", lambda x, eps: "")


def _penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    [grad] = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("ours_always")
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(12),
        lambda: nn.LayerNorm(12, elementwise_affine=False),
        lambda: nn.LayerNorm(12, bias=False),
        lambda: nn.LayerNorm(12).requires_grad_(False),
        lambda: nn.LayerNorm([7, 12]),
    ],
    ids=["usual", "nothing learned", "no bias", "frozen", "two dimensions"],
)
def test_as_in_pytorch(norm: object) -> None:
    assert_as_exact(Block(norm()), images(), gradients)  # type: ignore[operator]


@pytest.mark.usefixtures("ours_always")
def test_gradients_of_gradients() -> None:
    assert_as_exact(Block(), images(), _penalty)


@pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "it is there")
def test_kernels_run_forward_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm_calls, "_LEAST_NUMBERS", 0)
    stages.forget()
    with sepconv.ops.explain.record() as choices:
        gradients(ours(Block())[0], images())
    found = {choice.op: choice.kernel for choice in choices if "layer_norm" in choice.op}
    assert found == {"layer_norm_stage": "halide", "layer_norm_stage_gradients": "halide"}
    assert_as_exact(Block(), images(), gradients)


def test_small_ones_are_explained() -> None:
    stages.forget()
    with sepconv.ops.explain.record() as choices:
        gradients(ours(Block())[0], images())
    [norm] = [choice for choice in choices if "layer_norm" in choice.op]
    assert norm.kernel == "torch"
    assert "too few" in norm.reasons["halide"]


@pytest.mark.usefixtures("ours_always")
def test_autocast_gives_what_pytorch_gives() -> None:
    model, x = Block(), images()
    replaced = ours(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = replaced(x).detach(), model(x).detach()
    assert found.dtype is plain.dtype
    assert float((found - plain).abs().max()) <= 2**-6 * float(plain.abs().max())


def test_there_and_back() -> None:
    model = Block()
    replaced = sepconv.replace_layers(model)
    assert replaced.replaced["norm"] == "layer_norm"
    assert type(model.norm) is LayerNorm
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(sepconv.restore_layers(copied).norm) is nn.LayerNorm
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(model.norm)
    assert torch.equal(scripted(torch.ones(2, 12)), model.norm(torch.ones(2, 12)))
    replaced.undo()
    assert type(model.norm) is nn.LayerNorm
    assert "waits" not in vars(model.norm)
    assert (
        sepconv.replace_layers(model, filter=lambda module, name: name != "norm").left["norm"] == "the filter left it"
    )
