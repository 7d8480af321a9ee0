"""Does a plan compute what the model computes? Asked once for every plan, on the inputs it is made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sepconv.kernels.case import Geometry
from sepconv.kernels.torch import aten

# Relative to the largest output. Rounding differs by far less; what the capture cannot see (NumPy code on the values, a
# random number) changes results by more.
AGREEMENT = 1e-2


def _depthwise(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, activation: str) -> Tensor:
    geometry = Geometry(stride, tuple(zip(padding[::2], padding[1::2], strict=True)), dilation)
    return aten.depthwise_forward(x, weight, bias, geometry, activation)


def _pointwise(x: Any, weight: Any, bias: Any, residual: Any, activation: str) -> Tensor:
    return aten.pointwise_forward(x, weight, bias, activation, residual)


def _separable(
    x: Any, dw: Any, pw: Any, dw_bias: Any, pw_bias: Any, residual: Any, stride: Any, padding: Any, dilation: Any,
    between: str, activation: str,
) -> Tensor:  # fmt: skip
    hidden = _depthwise(x, dw, dw_bias, stride, padding, dilation, between)
    return aten.pointwise_forward(hidden, pw, pw_bias, activation, residual)


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "sepconv::depthwise_conv": _depthwise,
    "sepconv::pointwise_conv": _pointwise,
    "sepconv::separable_conv": _separable,
}


class ThroughPyTorch(TorchDispatchMode):
    """Our own operations by PyTorch's kernels: nothing of ours to compile, and nothing shared with what is checked."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(op._schema.name, op)(*args, **(kwargs or {}))


def disagreement(got: Sequence[Any], expected: Sequence[Any]) -> str:
    """In a sentence, how results differ from the model's by more than rounding; "" if they do not."""
    for ours, models in zip(got, expected, strict=True):
        if not isinstance(models, Tensor):
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
        if difference > AGREEMENT * scale:
            return f"the captured operations give other results than the model (by {difference / scale:.2g})"
    return ""


def _form(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def shaken(leaf: Any) -> Any:
    """A float input with noise of its own size: at an example of zeros most defects would not show."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.device.type != "cpu":
        return leaf
    size = float(leaf.double().std()) if leaf.numel() > 1 else 0.0
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return (leaf + noise * (size if 0.0 < size < float("inf") else 1.0)).to(leaf.dtype)
