"""The activations: all that any part of the library knows of one, in one record.

Numbers are PyTorch's to rounding, with its results for NaN and infinities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_aten = torch.ops.aten
_INF = math.inf


@dataclass(frozen=True, slots=True)
class Activation:
    """One function of a number.

    Args:
        name: by which users ask for it; "" for none at all.
        function: PyTorch's own.
        module: PyTorch's module of it.
        backward: the gradient of its input, from that of its output and a value: the output if ``from_output``, else
            the input, which must be kept or computed again.
        operators: those by which a captured graph may call it, with nothing but its input.
        expression: the same in Halide: of the module ``halide`` and a float32 expression.
        limits: between which it clamps its input and does nothing else; None for a curve.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    module: type[nn.Module]
    backward: Callable[[Tensor, Tensor], Tensor]
    from_output: bool
    operators: tuple[Any, ...]
    expression: Callable[[Any, Any], Any]
    limits: tuple[float, float] | None


def _identity(x: Tensor) -> Tensor:
    return x


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(grad, z)
    # aten.silu_backward cannot be differentiated again; its formula can.
    s = torch.sigmoid(z)
    return grad * s * (1 + z * (1 - s))


# Halide may compile max(x, 0) to 0 for NaN. Comparisons under strict_float keep NaN; only the activation is strict, so
# the sums before it still compile to fused multiply-adds.


def _limit(hl: Any, x: Any, low: float, high: float) -> Any:
    """clamp, but NaN stays NaN."""
    return hl.select(x < hl.f32(low), hl.f32(low), hl.select(x > hl.f32(high), hl.f32(high), x))


def _exp_of_minus(hl: Any, x: Any) -> Any:
    """exp(-x); Halide's exp is wrong for NaN and minus infinity. exp(89) is already infinite in float32.

    NaN is told by its bits: ``hl.is_nan`` and comparisons with itself are simplified away, ``strict_float`` or not.
    """
    number = (hl.reinterpret(hl.UInt(32), x) & hl.u32(0x7FFFFFFF)) <= hl.u32(0x7F800000)
    return hl.select(number, hl.exp(-_limit(hl, x, -89.0, 104.0)), x)


def _relu(hl: Any, x: Any) -> Any:
    return hl.strict_float(hl.select(x < hl.f32(0.0), hl.f32(0.0), x))


def _relu6(hl: Any, x: Any) -> Any:
    return hl.strict_float(_limit(hl, x, 0.0, 6.0))


def _silu(hl: Any, x: Any) -> Any:
    return hl.strict_float(x / (hl.f32(1.0) + _exp_of_minus(hl, x)))


def _hardswish(hl: Any, x: Any) -> Any:
    return hl.strict_float(x * _limit(hl, x + hl.f32(3.0), 0.0, 6.0) * hl.f32(1.0 / 6.0))


def _gelu(hl: Any, x: Any) -> Any:
    """Halide's erf is NaN for infinities; erf(4) rounds to 1 in float32."""
    erf = hl.erf(_limit(hl, x * hl.f32(0.5**0.5), -6.0, 6.0))
    return hl.strict_float(hl.f32(0.5) * x * (hl.f32(1.0) + erf))


def _sigmoid(hl: Any, x: Any) -> Any:
    return hl.strict_float(hl.f32(1.0) / (hl.f32(1.0) + _exp_of_minus(hl, x)))


_RECORDS = (
    Activation(
        name="",
        function=_identity,
        module=nn.Identity,
        backward=lambda grad, y: grad,
        from_output=True,
        operators=(),
        expression=lambda hl, x: x,
        limits=(-_INF, _INF),
    ),
    Activation(
        name="relu",
        function=F.relu,
        module=nn.ReLU,
        backward=lambda grad, y: _aten.threshold_backward(grad, y, 0),
        from_output=True,
        operators=(_aten.relu.default,),
        expression=_relu,
        limits=(0.0, _INF),
    ),
    Activation(
        name="relu6",
        function=F.relu6,
        module=nn.ReLU6,
        backward=lambda grad, y: _aten.hardtanh_backward(grad, y, 0, 6),
        from_output=True,
        operators=(_aten.relu6.default,),
        expression=_relu6,
        limits=(0.0, 6.0),
    ),
    Activation(
        name="silu",
        function=F.silu,
        module=nn.SiLU,
        backward=_silu_backward,
        from_output=False,
        operators=(_aten.silu.default,),
        expression=_silu,
        limits=None,
    ),
    Activation(
        name="hardswish",
        function=F.hardswish,
        module=nn.Hardswish,
        backward=lambda grad, z: _aten.hardswish_backward(grad, z),
        from_output=False,
        operators=(_aten.hardswish.default,),
        expression=_hardswish,
        limits=None,
    ),
    Activation(
        name="gelu",
        function=F.gelu,
        module=nn.GELU,
        backward=lambda grad, z: _aten.gelu_backward(grad, z),
        from_output=False,
        operators=(_aten.gelu.default,),
        expression=_gelu,
        limits=None,
    ),
    Activation(
        name="sigmoid",
        function=torch.sigmoid,
        module=nn.Sigmoid,
        backward=lambda grad, y: _aten.sigmoid_backward(grad, y),
        from_output=True,
        operators=(_aten.sigmoid.default,),
        expression=_sigmoid,
        limits=None,
    ),
)
ACTIVATIONS: dict[str, Activation] = {record.name: record for record in _RECORDS}
NAMES = tuple(name for name in ACTIVATIONS if name)
"""What a user may ask for."""

_BY_MODULE: dict[type[nn.Module], str] = {record.module: record.name for record in _RECORDS}


def name_of(module: nn.Module | None) -> str | None:
    """The name of what a module computes, "" for nothing at all; None if there is no record of it.

    Example:
        >>> name_of(nn.ReLU6()), name_of(nn.GELU("tanh")), name_of(None)
        ('relu6', None, '')
    """
    if module is None:
        return ""
    name = _BY_MODULE.get(type(module))
    return None if name == "gelu" and module.approximate != "none" else name


def clamping(low: float, high: float) -> str | None:
    """The name of the activation that is clamp(low, high); None if there is none."""
    return next((record.name for record in _RECORDS if record.limits == (low, high)), None)
