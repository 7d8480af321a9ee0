"""PyTorch's counter of floating-point operations sees our operators as the convolutions that they are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv.ops import convolutions

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _counted(model: nn.Module, x: Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.backward(torch.ones_like(y))
    total: int = counter.get_total_flops()
    return total


def _plain(dims: int) -> nn.Sequential:
    """Strides, padding, a multiplier and an even kernel."""
    conv = _CONV[dims]
    return nn.Sequential(
        conv(4, 8, 3, 2, 1, groups=4, bias=False), nn.ReLU(), conv(8, 6, 1, bias=False), conv(6, 6, 4, groups=6)
    )


def _ours(dims: int) -> nn.Sequential:
    depthwise, pointwise = (getattr(sepconv, f"{kind}Conv{dims}d") for kind in ("Depthwise", "Pointwise"))
    plain: Any = _plain(dims)
    parts = (depthwise, nn.ReLU, pointwise, depthwise)
    convert = [kind.from_conv(conv) if kind is not nn.ReLU else conv for kind, conv in zip(parts, plain, strict=True)]
    return nn.Sequential(*convert)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_count_as_the_equal_convolutions(dims: int, backward: bool) -> None:
    x = torch.randn(2, 4, *[13, 11, 9][:dims], requires_grad=True)
    expected = _counted(_plain(dims), x, backward)
    assert _counted(_ours(dims), x, backward) == expected > 0


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_separable_layer_counts_as_its_two_convolutions(dims: int) -> None:
    conv, x = _CONV[dims], torch.randn(2, 4, *[13, 11, 9][:dims], requires_grad=True)
    depthwise, pointwise = conv(4, 8, 3, 2, 1, groups=4), conv(8, 6, 1)
    layer = getattr(sepconv, f"SeparableConv{dims}d").from_conv(depthwise, pointwise)
    parts = nn.Sequential(depthwise, pointwise)
    forward = _counted(parts, x, False)
    assert _counted(layer, x, False) == forward
    assert _counted(layer, x, True) == _counted(parts, x, True), "what lies between is kept"


def test_what_a_separable_layer_computes_again_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """No biases: their gradients are matrix products here, which are counted, and sums in PyTorch, which are not."""
    monkeypatch.setattr(convolutions, "_MOST_KEPT", 0)
    x = torch.randn(2, 4, 13, 11).contiguous(memory_format=torch.channels_last).requires_grad_()
    depthwise, pointwise = nn.Conv2d(4, 8, 3, 2, 1, groups=4, bias=False), nn.Conv2d(8, 6, 1, bias=False)
    layer, parts = sepconv.SeparableConv2d.from_conv(depthwise, pointwise), nn.Sequential(depthwise, pointwise)
    assert _counted(layer, x, True) == _counted(parts, x, True) + _counted(depthwise, x, False)


def test_a_network_with_norms_counts_the_same_in_training() -> None:
    x = torch.randn(2, 3, 32, 32)
    model: Any = sepconv.models.MobileNetV2(0.25, num_classes=10, small_images=True)

    def plainly(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                plain = nn.Conv2d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding,
                    groups=child.groups, bias=False,
                )  # fmt: skip
                setattr(module, name, plain)
            else:
                plainly(child)
        return module

    ours = [_counted(model, x, backward) for backward in (False, True)]
    assert ours == [_counted(plainly(model), x, backward) for backward in (False, True)]


@pytest.mark.parametrize("order", ["torch.utils.flop_counter, sepconv", "sepconv, torch.utils.flop_counter"])
def test_whichever_is_imported_first(order: str) -> None:
    code = (
        f"import sys, torch, {order}; registered = sys.modules['torch.utils.flop_counter'].flop_registry\n"
        "print(sum('sepconv' in str(operator) for operator in registered))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "5"


def test_importing_the_library_does_not_import_the_counter() -> None:
    """Which imports Triton where there is one."""
    code = "import sys, torch; before = 'torch.utils.flop_counter' in sys.modules; import sepconv\n"
    code += "print(before, 'torch.utils.flop_counter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
