"""Does a prepared network compute what the model does? Asked once of each, on the inputs that it is made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sepconv.compile.numbers import BFLOAT16, FLOAT32, NumberType
from sepconv.kernels.torch import aten
from sepconv.ops.quantized import FAKE_QUANTIZE
from sepconv.ops.schema import geometry_of

# By the number type of a network's values, relative to the largest output. In most networks rounding differs by far
# less; defects, and what the capture cannot see (NumPy code on the values, a random number), change results by more.
AGREEMENT = {FLOAT32.storage: 1e-4, BFLOAT16.storage: 2.0**-8, torch.uint8: 2.0**-7}

MOST = 1e-2
"""What is allowed at most where a network moves so much by rounding alone."""

MOST_OF_FEW_BITS, MARGIN_OF_FEW_BITS = 0.25, 4.0
"""The same for numbers of 16 and 8 bits, and by how much more than the model rounded otherwise ours may differ."""

NUDGE, NUDGES = 2.0**-7, 3
"""Steps of a value, about the largest part of one that a step of the sums before it is; and how often all are moved."""

NOISE, MARGIN = 2.0**-22, 30.0
"""Rounding at the input, and by how much more than that the rounding of all layers may move the result."""


SLACK = 1.01


def agreement(numbers: Iterable[NumberType]) -> float:
    """How far the results of a network with values of these types may be from the model's."""
    return max([AGREEMENT[FLOAT32.storage], *(AGREEMENT.get(number.storage, 0.0) for number in numbers)])


def _depthwise(given: Mapping[str, Any]) -> Tensor:
    geometry = geometry_of(given["stride"], given["padding"], given["dilation"])
    return aten.depthwise_forward(given["x"], given["weight"], given["bias"], geometry, given["activation"])


def _pointwise(given: Mapping[str, Any]) -> Tensor:
    return aten.pointwise_forward(given["x"], given["weight"], given["bias"], given["activation"], given["residual"])


def _separable(given: Mapping[str, Any]) -> Tensor:
    first = {"weight": given["depthwise_weight"], "bias": given["depthwise_bias"]}
    second = {"weight": given["pointwise_weight"], "bias": given["pointwise_bias"]}
    hidden = _depthwise({**given, **first, "activation": given["depthwise_activation"]})
    return _pointwise({**given, **second, "x": hidden})


# By the arguments' names in the schema.
_PLAIN: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "sepconv::depthwise_conv": _depthwise,
    "sepconv::pointwise_conv": _pointwise,
    "sepconv::separable_conv": _separable,
}


class ThroughPyTorch(TorchDispatchMode):
    """Our own operations by PyTorch's kernels: nothing of ours to compile, and nothing shared with what is checked."""

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _PLAIN.get(op._schema.name)
        if plain is None:
            return op(*args, **(kwargs or {}))
        names = [argument.name for argument in op._schema.arguments]
        return plain({**dict(zip(names, args, strict=False)), **(kwargs or {})})


class InBfloat16(TorchDispatchMode):
    """Rounds what operations read, weights too, to bfloat16: what keeping all values in 16 bits does to a model.

    Operations that write into what they read, or give views of it, take it as it is.
    """

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if all(argument.alias_info is None for argument in op._schema.arguments):
            args, kwargs = pytree.tree_map_only(Tensor, _in_bfloat16, (args, kwargs or {}))
        return op(*args, **(kwargs or {}))


class Nudged(TorchDispatchMode):
    """Changes a little what is rounded to 8 bits, so that some numbers between two steps fall to the other one: biases
    are whole numbers of sums' steps, and sums in float32 are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(2)

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is FAKE_QUANTIZE:
            x, *rest = args
            if rest[2] < 0:
                args = (x + NUDGE * rest[0] * (torch.rand(x.shape, generator=self._random) - 0.5), *rest)
        return op(*args, **(kwargs or {}))


def _in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float() if x.dtype is torch.float32 else x


def disagreement(
    got: Sequence[Any], expected: Sequence[Any], allowed: float = AGREEMENT[FLOAT32.storage], step: float = 0.0
) -> str:
    """In a sentence, how results differ from the model's by more than is ``allowed``; "" if they do not.

    ``step``: of the last rounding to 8 bits; a number may have fallen to the next one.
    """
    for ours, models in zip(got, expected, strict=True):
        if not isinstance(models, Tensor):
            if type(ours) is not type(models) or ours != models:
                return f"beside tensors the model gives now {ours!r} and then {models!r}"
            continue
        if ours.shape != models.shape or ours.dtype is not models.dtype:
            return f"the captured operations give {_form(ours)} where the model gives {_form(models)}"
        if not models.is_floating_point() or not models.numel():
            continue
        finite = models.isfinite()
        if not torch.equal(finite, ours.isfinite()) or not torch.equal(ours.isnan(), models.isnan()):
            return "the captured operations give numbers where the model gives NaN or infinity, or the other way round"
        difference = (ours - models).abs()[finite].max().item() if finite.any() else 0.0
        scale = max(models[finite].abs().max().item() if finite.any() else 0.0, 1e-30)
        if difference > max(allowed * scale, SLACK * step):
            return f"the captured operations give other results than the model (by {difference / scale:.2g})"
    return ""


def tolerance(usual: float, moved: Sequence[Any], expected: Sequence[Any]) -> float:
    """How far results may be from ``expected``; ``moved`` are the model's own for an input rounded otherwise."""
    return max(usual, min(MOST, MARGIN * _distance(moved, expected)))


def tolerance_of_few_bits(usual: float, moved: Iterable[Sequence[Any]], expected: Sequence[Any]) -> float:
    """The same, where ``moved`` are the model's own results with its tensors rounded otherwise, in some ways."""
    most = max(_distance(found, expected) for found in moved)
    return max(usual, min(MOST_OF_FEW_BITS, MARGIN_OF_FEW_BITS * most))


def _distance(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference of two results relative to the largest output; infinite where they cannot be compared."""
    most = 0.0
    for ours, models in zip(found, expected, strict=True):
        if isinstance(models, Tensor) and models.is_floating_point() and models.numel():
            if ours.shape != models.shape:
                return math.inf
            scale = models.abs().nan_to_num(0, 0, 0).max().item()
            most = max(most, (ours - models).abs().nan_to_num(0, 0, 0).max().item() / max(scale, 1e-30))
    return most


def rounded(leaf: Any) -> Any:
    """A float input with noise in its last bits."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return (leaf * (1 + NOISE * noise.to(leaf.device))).to(leaf.dtype)


def _form(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def shaken(leaf: Any) -> Any:
    """A float input with noise of its own size: at an example of zeros most defects would not show."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.device.type != "cpu":
        return leaf
    size = float(leaf.double().std()) if leaf.numel() > 1 else 0.0
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return (leaf + noise * (size if 0.0 < size < float("inf") else 1.0)).to(leaf.dtype)
