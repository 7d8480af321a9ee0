"""A quantized network as tensors and a few names, and back: weights as the integers that they stand for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from sepconv.layers.borrowed import evaluating
from sepconv.leaves import Inputs
from sepconv.ops.quantized import integers
from sepconv.quantize.fake import FakeQuantize
from sepconv.quantize.layers import find_layers
from sepconv.quantize.placement import WEIGHT, place
from sepconv.quantize.quantization import prepared


class _Weight(NamedTuple):
    name: str
    tensor: nn.Parameter
    quantizer: FakeQuantize


def is_quantized(model: nn.Module) -> bool:
    """Whether :func:`sepconv.quantize` made it."""
    return isinstance(model, fx.GraphModule) and any(isinstance(part, FakeQuantize) for part in model.modules())


def left_in(model: fx.GraphModule) -> list[str]:
    """The layers that are no integers, by name."""
    return [layer.name for layer in find_layers(model)]


def _weights(model: nn.Module) -> Iterator[_Weight]:
    for path, quantizer in model.named_modules():
        owner, _, last = path.rpartition(".")
        if isinstance(quantizer, FakeQuantize) and last.endswith(WEIGHT):
            name = f"{owner}.{last.removesuffix('_quantizer')}".lstrip(".")
            yield _Weight(name, model.get_parameter(name), quantizer)


@torch.no_grad()
def packed(model: nn.Module) -> dict[str, Tensor]:
    """The state of a quantized network, with weights as int8."""
    state = dict(model.state_dict())
    for name, tensor, quantizer in _weights(model):
        steps = integers(tensor, quantizer.scale, quantizer.zero_point, quantizer.axis)
        state[name] = steps.clamp(quantizer.low, quantizer.high).to(torch.int8)
    return state


@torch.no_grad()
def unpack(model: nn.Module) -> None:
    """Weights that hold integers become the numbers that these stand for, in place."""
    for _, tensor, quantizer in _weights(model):
        tensor.mul_(quantizer.scale.view(-1, *[1] * (tensor.dim() - 1)))


def rebuilt(model: nn.Module, example: Inputs, left: Collection[str]) -> fx.GraphModule:
    """A network with the structure of the one that was quantized, whose numbers are still to be loaded.

    Args:
        model: as it was before; its tensors are used.
        example: two samples or more.
        left: the layers that are no integers.

    Raises:
        ValueError: the model cannot be captured, or has no such layers.
    """
    with evaluating(model):
        base = prepared(model, example)
    layers = place(base, left)
    if unknown := sorted(set(left) - {layer.name for layer in layers}):
        raise ValueError(f"the network has no layer {unknown[0]!r}")
    return base
