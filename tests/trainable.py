"""Small networks that train: plain ones, and the same with our layers, every stage of which is computed as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.kernels import stages as kernels
from sepconv.layers.replace import Replacements
from sepconv.ops import stages

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All stages are computed as one, by PyTorch's operators: no kernel has to be compiled for the sizes of a test."""
    monkeypatch.setattr(stages, "unpaid", lambda *case, **options: "")
    monkeypatch.setattr(kernels, "BACKENDS", {key: backends[-1:] for key, backends in kernels.BACKENDS.items()})
    kernels.forget()
    yield
    kernels.forget()


class Branch(nn.Module):
    """What a user may do with a tensor between two convolutions."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, in_place: bool = False) -> None:
        super().__init__()
        self.body, self.in_place = body, in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.in_place:
            y += x
            return y
        return x + y


def stage(inputs: int, outputs: int, kernel: int = 1, groups: int = 1, activation: Any = nn.ReLU6) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), activation()]


def network(between: nn.Module | None = None, at_end: nn.Module | None = None) -> nn.Sequential:
    """A stem, a pointwise and a depthwise stage around ``between``, a pointwise one, and a classifier."""
    return nn.Sequential(
        *stage(3, 8, 3),
        *stage(8, 12),
        *([] if between is None else [between]),
        *stage(12, 12, 3, groups=12),
        *stage(12, 8),
        *([] if at_end is None else [at_end]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def images(batch: int = 3, size: tuple[int, int] = (11, 7)) -> Tensor:
    return torch.randn(batch, 3, *size).contiguous(memory_format=torch.channels_last)


def ours(model: nn.Module) -> tuple[nn.Module, Replacements]:
    """A copy with our layers."""
    replaced = copy.deepcopy(model)
    return replaced, sepconv.replace_layers(replaced)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of all parameters and the image; the running statistics as they are after the step go with them."""
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**found, "image": x.grad, **{name: b for name, b in model.named_buffers() if b.is_floating_point()}}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the largest number of a tensor; what should be zero, such as the gradient of a bias before a norm, to
    a hundredth of the largest of all."""
    assert found.keys() == truth.keys()
    least = max(float(t.abs().max()) for t in truth.values()) / 100
    return {
        name: float((found[name].double() - t).abs().max() / t.abs().max().clamp_min(least))
        for name, t in truth.items()
    }


def assert_as_exact(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], dict[str, Tensor]]) -> nn.Module:
    """Our layers err no more than a few times what the plain ones do against float64; the replaced network.

    A sum in another order errs as much in another direction, and at a ReLU's corner one number may fall on the other
    side: a bound for all numbers of a network is a multiple of the largest error of the plain one.
    """
    replaced, _ = ours(model)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    truth = run(exact, x.double())
    bound = 8 * max(errors(run(plain, x), truth).values()) + 64 * EPS
    worst = errors(run(replaced, x), truth)
    assert max(worst.values()) <= bound, (worst, bound)
    return replaced
