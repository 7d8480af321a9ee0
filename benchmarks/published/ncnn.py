"""Networks in ncnn's files as PyTorch modules: a ``.param`` of text, a ``.bin`` of weights.

The layers that the published networks here are made of, by the parameter numbers of ncnn's documentation ("operation
param weight table", https://github.com/Tencent/ncnn/wiki); anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MAGIC = "7767517"
_FLOAT16 = 0x01306B47
_ACTIVATIONS = 9
_ARRAYS = -23300


class Weights:
    """A ``.bin`` read from front to back."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def plain(self, count: int) -> Tensor:
        """Numbers of 32 bits."""
        return self._take("<f4", count)

    def tagged(self, count: int) -> Tensor:
        """Numbers whose size a tag in front of them tells."""
        tag = int(np.frombuffer(self._content, "<u4", 1, self._at)[0])
        self._at += 4
        if tag not in (0, _FLOAT16):
            raise ValueError(f"ncnn: weights of kind {tag:#x} cannot be read, only float32 and float16")
        found = self._take("<f2" if tag else "<f4", count)
        self._at += -self._at % 4
        return found

    def _take(self, kind: str, count: int) -> Tensor:
        found = np.frombuffer(self._content, kind, count, self._at)
        self._at += found.nbytes
        return torch.from_numpy(found.astype(np.float32))

    @property
    def left(self) -> int:
        return len(self._content) - self._at


Values = dict[int, list[float]]


@dataclass(frozen=True)
class Line:
    """A layer of the ``.param``: names of what it reads and writes, and its parameters by number."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Values

    @classmethod
    def of(cls, text: str) -> Line:
        kind, name, read, written, *rest = text.split()
        names, given = rest[: int(read) + int(written)], rest[int(read) + int(written) :]
        values: Values = {}
        for key, _, value in (part.partition("=") for part in given):
            numbers = [float(number) for number in value.split(",")]
            number = int(key)
            # An array says how long it is, and is numbered from -23300 down.
            values[_ARRAYS - number if number <= _ARRAYS else number] = numbers[1:] if number <= _ARRAYS else numbers
        return cls(kind, name, tuple(names[: int(read)]), tuple(names[int(read) :]), values)

    def whole(self, number: int, default: int = 0) -> int:
        return int(self.values.get(number, [default])[0])


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class NcnnNetwork(nn.Module):
    """The layers in order, each by the name that ncnn has for it; one input and one output."""

    def __init__(self, param: Path, binary: Path) -> None:
        super().__init__()
        magic, _, *lines = param.read_text().strip().splitlines()
        if magic.strip() != _MAGIC:
            raise ValueError(f"ncnn: {param} is no param file")
        weights = Weights(binary.read_bytes())
        self.lines = [Line.of(line) for line in lines]
        for line in self.lines:
            if line.kind not in ("Input", "Split"):
                self.add_module(line.name, _layer(line, weights))
        if weights.left:
            raise ValueError(f"ncnn: {weights.left} bytes of {binary} belong to no layer")

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for line in self.lines:
            if line.kind == "Input":
                result = x
            elif line.kind == "Split":
                result = values[line.inputs[0]]
            else:
                result = self.get_submodule(line.name)(*(values[name] for name in line.inputs))
            values |= dict.fromkeys(line.outputs, result)
        return result


def _layer(line: Line, weights: Weights) -> nn.Module:
    if line.kind not in _LAYERS:
        raise ValueError(f"ncnn: no layer {line.kind!r} here, which {line.name} is")
    return _LAYERS[line.kind](line, weights)


def _activated(line: Line, layer: nn.Module) -> nn.Module:
    kind, parameters = line.whole(_ACTIVATIONS), line.values.get(10, [])
    if kind == 0:
        return layer
    known = {1: nn.ReLU(), 2: nn.LeakyReLU(*parameters[:1]), 4: nn.Sigmoid()}
    return nn.Sequential(layer, known[kind])


def _filled(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


def _convolution(line: Line, weights: Weights, *, transposed: bool = False) -> nn.Module:
    out, width = line.whole(0), line.whole(1)
    height, count, has_bias = line.whole(11, width), line.whole(6), bool(line.whole(5))
    channels = count // (out * width * height)
    stride, padding, dilation = line.whole(3, 1), line.whole(4), line.whole(2, 1)
    weight = weights.tagged(count).reshape(out, channels, height, width)
    bias = weights.plain(out) if has_bias else None
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(channels, out, (height, width), stride, padding, dilation=dilation, bias=has_bias)
    return _activated(line, _filled(layer, weight.transpose(0, 1) if transposed else weight, bias))


def _deconvolution(line: Line, weights: Weights) -> nn.Module:
    return _convolution(line, weights, transposed=True)


def _inner_product(line: Line, weights: Weights) -> nn.Module:
    """On one pixel: a pointwise convolution."""
    out, count = line.whole(0), line.whole(2)
    weight = weights.tagged(count).reshape(out, count // out, 1, 1)
    bias = weights.plain(out) if line.whole(1) else None
    return _activated(line, _filled(nn.Conv2d(count // out, out, 1, bias=bias is not None), weight, bias))


def _prelu(line: Line, weights: Weights) -> nn.Module:
    layer = nn.PReLU(line.whole(0))
    with torch.no_grad():
        layer.weight.copy_(weights.plain(line.whole(0)))
    return layer


def _pooling(line: Line, weights: Weights) -> nn.Module:
    if not (line.whole(0) == 1 and line.whole(4)):
        raise ValueError(f"ncnn: {line.name} is no mean over all pixels")
    return nn.AdaptiveAvgPool2d(1)


def _crop(line: Line, weights: Weights) -> nn.Module:
    """To the size of the second input, from the offsets of the first two axes."""
    left, top = line.whole(0), line.whole(1)
    return Call(lambda x, like: x[..., top : top + like.shape[-2], left : left + like.shape[-1]])


def _eltwise(line: Line, weights: Weights) -> nn.Module:
    factors = line.values.get(1, [])
    if line.whole(0) != 1:
        raise ValueError(f"ncnn: {line.name} is no sum")
    return Call(lambda x, y: x + y if not factors else factors[0] * x + factors[1] * y)


def _binary(line: Line, weights: Weights) -> nn.Module:
    operation, scalar = line.whole(0), line.values.get(2, [0.0])[0]
    function: Callable[[Tensor, Tensor | float], Tensor] = {0: torch.add, 2: torch.mul}[operation]
    return Call((lambda x: function(x, scalar)) if line.whole(1) else function)


def _interp(line: Line, weights: Weights) -> nn.Module:
    mode, scale = {1: "nearest", 2: "bilinear"}[line.whole(0)], line.values[1][0]
    return Call(lambda x: F.interpolate(x, scale_factor=scale, mode=mode))


_LAYERS: dict[str, Callable[[Line, Weights], nn.Module]] = {
    "Convolution": _convolution,
    "Deconvolution": _deconvolution,
    "InnerProduct": _inner_product,
    "PReLU": _prelu,
    "Pooling": _pooling,
    "Scale": lambda line, weights: Call(torch.mul),
    "Crop": _crop,
    "Eltwise": _eltwise,
    "BinaryOp": _binary,
    "Interp": _interp,
    "PixelShuffle": lambda line, weights: nn.PixelShuffle(line.whole(0)),
    "Concat": lambda line, weights: Call(lambda *parts: torch.cat(parts, 1)),
}
