"""Quantized networks in ONNX: pairs of QuantizeLinear and DequantizeLinear, which runtimes compute in integers.

Weights are int8 in the file, with a scale for each output channel, biases int32, activations uint8. A runtime may
divide by a scale where we multiply by its reciprocal, and multiplies the scale of a sum in its own order: a number that
lies between two steps may then come out as the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sepconv.ops.quantized import FAKE_QUANTIZE, MOST

_LAYERS = ("Conv", "Gemm")
_MOVES = ("Reshape", "Flatten", "Transpose", "Pad", "Squeeze", "Unsqueeze", "Identity")
_INT8, _UINT8 = 3, 2
"""As ``onnx.TensorProto`` has them."""


def translations() -> dict[Any, Callable[..., Any]]:
    """For PyTorch's exporter: what our operator becomes."""
    from onnxscript import opset18

    op: Any = opset18

    def fake_quantize(x: Any, scale: Any, zero_point: Any, axis: int, low: int, high: int) -> Any:
        zero = op.Cast(zero_point, to=_INT8 if low < 0 else _UINT8)
        settings = {} if axis < 0 else {"axis": axis}
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero, **settings), scale, zero, **settings)

    return {FAKE_QUANTIZE: fake_quantize}


def store_integers(proto: Any) -> None:
    """Weights and biases of an exported file become integers, in place."""
    file = _File(proto)
    for node in [*proto.graph.node]:
        if node.op_type == "QuantizeLinear" and node.input[0] in file.constants:
            file.store_weight(node)
    file = _File(proto)
    for node in [*proto.graph.node]:
        if node.op_type in _LAYERS and len(node.input) == 3 and node.input[2] in file.constants:
            file.store_bias(node)


class _File:
    """A graph by names."""

    def __init__(self, proto: Any) -> None:
        from onnx import numpy_helper

        self.graph = proto.graph
        self.constants = {one.name: one for one in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self._helper = numpy_helper

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._helper.to_array(self.constants[name]).copy())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.graph.initializer.append(self._helper.from_array(tensor.numpy(), name))

    def store_weight(self, node: Any) -> None:
        weight, scale = self.tensor(node.input[0]), self.tensor(node.input[1])
        steps = weight.mul(scale.reciprocal().view(-1, *[1] * (weight.dim() - 1))).round().clamp(-MOST, MOST)
        self.add(node.output[0], steps.to(torch.int8))
        name = node.input[0]
        self.graph.node.remove(node)
        if not any(name in other.input for other in self.graph.node):
            self.graph.initializer.remove(self.constants.pop(name))

    def store_bias(self, node: Any) -> None:
        """In units of its sums, unless the input or the weight is no integers, or it is too large for 32 bits."""
        from onnx import helper

        x, weight = (self._scale(name) for name in node.input[:2])
        if x is None or weight is None or x.dim() or any(one.name == "alpha" for one in node.attribute if one.f != 1):
            return
        bias, scale = self.tensor(node.input[2]), x * weight
        steps = (bias.double() / scale.double()).round()
        if bool((steps.abs() >= 2**31).any()):
            return
        name = f"{node.input[2]}_steps"
        if name not in self.constants:
            for key, tensor in (("", steps.to(torch.int32)), ("_scale", scale), ("_zero", steps.int().zero_())):
                self.add(f"{name}{key}", tensor)
            inputs = [name, f"{name}_scale", f"{name}_zero"]
            made = helper.make_node("DequantizeLinear", inputs, [f"{name}_bias"], axis=0)
            self.graph.node.insert([*self.graph.node].index(node), made)
        old = node.input[2]
        node.input[2] = f"{name}_bias"
        if not any(old in other.input for other in self.graph.node):
            self.graph.initializer.remove(self.constants.pop(old))

    def _scale(self, name: str) -> torch.Tensor | None:
        """Of the steps that a value is on."""
        node = self.makers.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self.makers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in self.constants:
            return None
        return self.tensor(node.input[1])
