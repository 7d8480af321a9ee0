"""True MobileNet blocks grown from the linear start: a norm and an activation between depthwise and pointwise layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.layers import SeparableConv2d


def norm(model: nn.Module, images: Tensor) -> nn.Module:
    """Put a batch norm behind every depthwise layer, which on `images` changes nothing at first."""
    return _put(model, images, lambda norm, channels: norm)


def activation(model: nn.Module, images: Tensor) -> nn.Module:
    """Put a batch norm and a PReLU there, whose learned slopes start at 1 (He et al. 2015, arXiv:1502.01852)."""
    return _put(model, images, lambda norm, channels: nn.Sequential(norm, nn.PReLU(channels, init=1.0)))


def _put(model: nn.Module, images: Tensor, make: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, SeparableConv2d)]
    outputs: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.depthwise.register_forward_hook(lambda *call: outputs.update({call[0]: call[2]})) for layer in layers
    ]
    was_training = model.training
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.depthwise_norm = make(_identity(outputs.pop(layer.depthwise)), layer.depthwise.out_channels)
    return model.train(was_training)


def _identity(x: Tensor) -> nn.BatchNorm2d:
    """The batch norm that gives back `x`: (N, C, H, W), now and for images like these."""
    variance, mean = torch.var_mean(x, (0, 2, 3))
    layer = nn.BatchNorm2d(x.shape[1])
    layer.load_state_dict(
        {
            "weight": (variance + layer.eps).sqrt(),
            "bias": mean,
            "running_mean": mean,
            "running_var": variance,
            "num_batches_tracked": torch.tensor(0),
        }
    )
    return layer
