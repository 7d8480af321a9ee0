"""Networks of torchvision, timm and transformers with our layers in place: they learn alike and come back as they were.

Random weights: nothing is downloaded. Whoever lacks one of these packages is told so.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv

pytestmark = pytest.mark.slow

STEPS, CLASSES = 3, 10


def _torchvision(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="the package torchvision is not installed")
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    return model


def _timm(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="the package timm is not installed")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return model


def _transformers(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **settings)
    model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"torchvision/{name}": lambda name=name: _torchvision(name) for name in (
        "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0",
    )},
    **{f"timm/{name}": lambda name=name: _timm(name) for name in (
        "mobilenetv4_conv_small", "fastvit_t8", "convnext_atto",
    )},
    "transformers/mobilenet_v2": lambda: _transformers("MobileNetV2", depth_multiplier=0.5),
    "transformers/convnext": lambda: _transformers("ConvNext", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1]),
}  # fmt: skip
FUSED = {
    "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/efficientnet_b0",
    "timm/mobilenetv4_conv_small", "timm/fastvit_t8", "transformers/mobilenet_v2",
}  # fmt: skip
"""Those with batch norms between their convolutions; ConvNeXt has others."""


def _made(name: str) -> nn.Module:
    """The same every time, and without chance in its steps."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    return model


def _scores(result: Any) -> Tensor:
    scores: Tensor = result if isinstance(result, Tensor) else result.logits
    return scores


def _trained(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """All numbers that three steps have changed, side by side."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 3, 96, 96, generator=generator).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(_scores(model(x.to(dtype))), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    return torch.cat([t.detach().flatten().double() for t in state])


def _outline(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", NETWORKS)
def test_three_steps_are_those_of_the_network_itself(name: str) -> None:
    start = _made(name)
    model, plain, exact = (copy.deepcopy(start) for _ in range(3))
    made = sepconv.replace_layers(model)
    assert Counter(made.replaced.values())["depthwise"] > 0
    assert [*model.state_dict()] == [*start.state_dict()]
    with sepconv.ops.explain.record() as choices:
        ours = _trained(model)
    before = torch.cat([t.flatten().double() for t in start.state_dict().values() if t.is_floating_point()])
    truth, theirs = _trained(exact.double(), torch.float64), _trained(plain)
    moved = float((truth - before).norm())
    errors = [float((found - truth).norm()) / moved for found in (ours, theirs)]
    assert errors[0] <= 4 * errors[1] + 1e-5, errors
    kernels = {choice.op for choice in choices if choice.kernel == "halide"}
    assert ("depthwise_stage_gradients" in kernels and "finish_stage" in kernels) == (name in FUSED)
    sepconv.restore_layers(model)
    assert _outline(model) == _outline(start)
    assert [*model.state_dict()] == [*start.state_dict()]


@pytest.mark.parametrize("name", NETWORKS)
def test_under_autocast_they_err_as_pytorchs(name: str) -> None:
    start = _made(name)
    model, plain, exact = (copy.deepcopy(start) for _ in range(3))
    sepconv.replace_layers(model)
    truth = _trained(exact.double(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = _trained(model), _trained(plain)
    errors = [float((found - truth).norm()) for found in (ours, theirs)]
    assert errors[0] <= 2 * errors[1], errors
