"""The activations: all that any part of the library knows of one, in one record.

Numbers are PyTorch's to rounding, with its results for NaN and infinities. Some take parameters, which stand behind the
name as in a call: ``"leaky_relu(0.2)"``, ``"elu(0.5)"``, ``"softplus(2.0, 20.0)"``, ``"clamp(-1.0, 1.0)"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
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
        module: makes PyTorch's module of it.
        backward: the gradient of its input, from that of its output and a value: the output if ``from_output``, else
            the input, which must be kept or computed again.
        expression: the same in Halide: of the module ``halide`` and a float32 expression.
        operators: those by which a captured graph may call it, with nothing but its input.
        limits: between which it clamps its input and does nothing else; None for a curve.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    module: Callable[[], nn.Module]
    backward: Callable[[Tensor, Tensor], Tensor]
    expression: Callable[[Any, Any], Any]
    from_output: bool = False
    operators: tuple[Any, ...] = ()
    limits: tuple[float, float] | None = None


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
    """clamp, but NaN stays NaN. One after the other: each is then one instruction."""
    below = hl.select(x > hl.f32(high), hl.f32(high), x)
    return hl.select(below < hl.f32(low), hl.f32(low), below)


# Digits of log(2): products of whole numbers with the first part are exact.
_LOG2_PARTS = (0.693359375, -2.12194440e-4)
# Twice exp(-x) for x between half of log(2) below and above 0, within 4e-9 of itself.
_TWICE_EXP = (2.0, -2.0, 0.99999988, -0.333330422, 0.083336778, -0.0167374909, 0.00276290766)


def _exp_of_minus(hl: Any, x: Any) -> Any:
    """exp(-x), from below 2**-126 on zero: twice a polynomial, and half of two to a whole power, made of its bits.

    Halide's own takes twice as many steps, and is wrong for NaN and minus infinity. What is left of ``x`` beside the
    power is strict: sums in another order would lose its digits.
    """
    limited = hl.strict_float(_limit(hl, x, -89.0, 87.6))
    power = hl.round(limited * hl.f32(-1.0 / math.log(2.0)))
    first, second = (power * hl.f32(part) for part in _LOG2_PARTS)
    rest = hl.strict_float(limited + first + second)
    half = hl.reinterpret(hl.Float(32), (hl.cast(hl.Int(32), power) + hl.i32(126)) << hl.i32(23))
    return polynomial(hl, _TWICE_EXP, rest) * half


def exponential(hl: Any, x: Any) -> Any:
    """exp(x) in Halide, with PyTorch's results for NaN and infinities."""
    return _exp_of_minus(hl, -x)


def _relu(hl: Any, x: Any) -> Any:
    return hl.strict_float(hl.select(x < hl.f32(0.0), hl.f32(0.0), x))


def _relu6(hl: Any, x: Any) -> Any:
    return hl.strict_float(_limit(hl, x, 0.0, 6.0))


def _silu(hl: Any, x: Any) -> Any:
    return x / (hl.f32(1.0) + _exp_of_minus(hl, x))


def _hardswish(hl: Any, x: Any) -> Any:
    return hl.strict_float(x * _limit(hl, x + hl.f32(3.0), 0.0, 6.0) * hl.f32(1.0 / 6.0))


def polynomial(hl: Any, factors: Sequence[float], x: Any) -> Any:
    """``factors[0] + factors[1] * x + ...``, the last product first."""
    return reduce(lambda sum_, factor: sum_ * x + hl.f32(factor), factors[-2::-1], hl.f32(factors[-1]))


def half_and_odd(hl: Any, limit: float, factors: Sequence[float], x: Any) -> Any:
    """1/2 and an odd function between ``-limit`` and ``limit``, beyond them as there: a curve from 0 to 1, or nearly.

    ``factors`` are those of ``(curve(x) - 1/2) / x`` in powers of ``2 (x / limit)**2 - 1``. In two halves, so that sums
    need not wait for each other; and not strict: products and sums in one step.
    """
    near = hl.strict_float(_limit(hl, x, -limit, limit))
    at = near * near * hl.f32(2.0 / limit**2) - hl.f32(1.0)
    square = at * at
    even, odd = (polynomial(hl, factors[first::2], square) for first in range(2))
    return hl.f32(0.5) + near * (even + at * odd)


# The normal distribution; beyond the limits it is 0 or 1 within 8e-8. Fitted at Chebyshev's points, to 2e-8.
_GELU_LIMIT = 5.25
_GELU = (
    *(0.13465935, -0.067126818, 0.0496457852, -0.0397634134, 0.032031443, -0.0250419285, 0.0185386296, -0.0127752647),
    *(0.00841792487, -0.00544849318, 0.00289227744, -0.00103955797, 0.000664797029, -0.000656576012, 0.000239930494),
)


def _gelu(hl: Any, x: Any) -> Any:
    """Within 2e-7 of the larger of 1 and x; below the limit ``x - x``, which leaves infinity NaN as in PyTorch. (Halide
    makes 0 of a product with 0.)"""
    own = hl.strict_float(hl.select(x < hl.f32(-_GELU_LIMIT), x - x, x))
    return own * half_and_odd(hl, _GELU_LIMIT, _GELU, x)


def _sigmoid(hl: Any, x: Any) -> Any:
    return hl.f32(1.0) / (hl.f32(1.0) + _exp_of_minus(hl, x))


def _hardsigmoid(hl: Any, x: Any) -> Any:
    return hl.strict_float(_limit(hl, x + hl.f32(3.0), 0.0, 6.0) * hl.f32(1.0 / 6.0))


def _tanh(hl: Any, x: Any) -> Any:
    """Near 0 by a polynomial (Cephes), as the quotient loses its digits there."""
    square, term = x * x, hl.f32(-5.70498872745e-3)
    for factor in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        term = term * square + hl.f32(factor)
    curve = hl.f32(2.0) / (hl.f32(1.0) + _exp_of_minus(hl, x + x)) - hl.f32(1.0)
    small = (x > hl.f32(-0.625)) & (x < hl.f32(0.625))
    return hl.strict_float(hl.select(small, x + x * square * term, curve))


def _gelu_tanh(hl: Any, x: Any) -> Any:
    """``x * sigmoid(2 u)`` is ``x * (1 + tanh(u)) / 2``."""
    u = x * (hl.f32(1.0) + hl.f32(0.044715) * x * x) * hl.f32(2.0 * math.sqrt(2.0 / math.pi))
    return hl.strict_float(x / (hl.f32(1.0) + _exp_of_minus(hl, u)))


def _mish(hl: Any, x: Any) -> Any:
    """With ``e = exp(x)``, ``tanh(log(1 + e))`` is ``e (e + 2) / (e (e + 2) + 2)``, which is 1 from x = 20 on."""
    e = exponential(hl, _limit(hl, x, -104.0, 20.0))
    part = e * (e + hl.f32(2.0))
    return hl.strict_float(x * (part / (part + hl.f32(2.0))))


def _mish_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.mish_backward(grad, z)
    inner = torch.tanh(F.softplus(z))
    return grad * (inner + z * (1 - inner * inner) * torch.sigmoid(z))


def _elu(alpha: float, hl: Any, x: Any) -> Any:
    """``exp(x) - 1`` is ``tanh(x / 2) * (exp(x) + 1)``, which keeps its digits near 0."""
    below = _tanh(hl, x * hl.f32(0.5)) * (exponential(hl, x) + hl.f32(1.0))
    return hl.strict_float(hl.select(x > hl.f32(0.0), x, hl.f32(alpha) * below))


def _leaky_relu(slope: float, hl: Any, x: Any) -> Any:
    return hl.strict_float(hl.select(x < hl.f32(0.0), x * hl.f32(slope), x))


def _softplus(beta: float, threshold: float, hl: Any, x: Any) -> Any:
    """``log(1 + e)`` with the digits of a small e, which the sum has lost, brought back."""
    z = x * hl.f32(beta)
    e = exponential(hl, _limit(hl, z, -104.0, threshold))
    whole = hl.f32(1.0) + e
    lost = whole - hl.f32(1.0)
    curve = hl.select(lost > hl.f32(0.0), hl.log(whole) * (e / lost), e) * hl.f32(1.0 / beta)
    return hl.strict_float(hl.select(z > hl.f32(threshold), x, curve))


def _clamp(low: float, high: float, hl: Any, x: Any) -> Any:
    return hl.strict_float(_limit(hl, x, low, high))


_RECORDS = (
    Activation(
        name="",
        function=_identity,
        module=nn.Identity,
        backward=lambda grad, y: grad,
        from_output=True,
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
    Activation("silu", F.silu, nn.SiLU, _silu_backward, _silu, operators=(_aten.silu.default,)),
    Activation(
        "hardswish", F.hardswish, nn.Hardswish, lambda grad, z: _aten.hardswish_backward(grad, z), _hardswish,
        operators=(_aten.hardswish.default,),
    ),
    Activation(
        "gelu", F.gelu, nn.GELU, lambda grad, z: _aten.gelu_backward(grad, z), _gelu, operators=(_aten.gelu.default,)
    ),
    Activation(
        "sigmoid", torch.sigmoid, nn.Sigmoid, lambda grad, y: _aten.sigmoid_backward(grad, y), _sigmoid, True,
        operators=(_aten.sigmoid.default,),
    ),
    Activation(
        "hardsigmoid", F.hardsigmoid, nn.Hardsigmoid, lambda grad, z: torch.where((z > -3) & (z < 3), grad / 6, 0.0),
        _hardsigmoid, operators=(_aten.hardsigmoid.default,),
    ),
    Activation(
        "tanh", torch.tanh, nn.Tanh, lambda grad, y: _aten.tanh_backward(grad, y), _tanh, True,
        operators=(_aten.tanh.default,),
    ),
    Activation(
        "gelu_tanh", partial(F.gelu, approximate="tanh"), partial(nn.GELU, "tanh"),
        lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"), _gelu_tanh,
    ),
    Activation("mish", F.mish, nn.Mish, _mish_backward, _mish, operators=(_aten.mish.default,)),
)  # fmt: skip


def _of_slope(name: str, slope: float = 0.01) -> Activation:
    return Activation(
        name=name,
        function=partial(F.leaky_relu, negative_slope=slope),
        module=partial(nn.LeakyReLU, slope),
        backward=lambda grad, z: _aten.leaky_relu_backward(grad, z, slope, False),
        expression=partial(_leaky_relu, slope),
    )


def _of_alpha(name: str, alpha: float = 1.0) -> Activation:
    return Activation(
        name=name,
        function=partial(F.elu, alpha=alpha),
        module=partial(nn.ELU, alpha),
        backward=lambda grad, z: _aten.elu_backward(grad, alpha, 1, 1, False, z),
        expression=partial(_elu, alpha),
    )


def _of_beta(name: str, beta: float = 1.0, threshold: float = 20.0) -> Activation:
    return Activation(
        name=name,
        function=partial(F.softplus, beta=beta, threshold=threshold),
        module=partial(nn.Softplus, beta, threshold),
        backward=lambda grad, z: _aten.softplus_backward(grad, z, beta, threshold),
        expression=partial(_softplus, beta, threshold),
    )


def _of_limits(name: str, low: float = -1.0, high: float = 1.0) -> Activation:
    if not low < high:
        raise ValueError(f"activations: the first limit must be the lower one, got {name!r}")
    return Activation(
        name=name,
        function=partial(F.hardtanh, min_val=low, max_val=high),
        module=partial(nn.Hardtanh, low, high),
        backward=lambda grad, y: _aten.hardtanh_backward(grad, y, low, high),
        from_output=True,
        expression=partial(_clamp, low, high),
        limits=(low, high),
    )


_FAMILIES: dict[str, Callable[..., Activation]] = {
    "leaky_relu": _of_slope,
    "elu": _of_alpha,
    "softplus": _of_beta,
    "clamp": _of_limits,
}


def _with_parameters(name: str) -> Activation:
    family, _, rest = name.partition("(")
    if family not in _FAMILIES or not rest.endswith(")"):
        raise KeyError(name)
    try:
        return _FAMILIES[family](name, *[float(number) for number in rest[:-1].split(",")])
    except (TypeError, ValueError) as error:
        raise KeyError(name) from error


class _Activations(dict[str, Activation]):
    """By name; one with parameters is made when it is asked for."""

    def __missing__(self, name: str) -> Activation:
        return _with_parameters(name)


ACTIVATIONS: dict[str, Activation] = _Activations(
    {record.name: record for record in (*_RECORDS, *(make(name) for name, make in _FAMILIES.items()))}
)
NAMES = tuple(name for name in ACTIVATIONS if name)
"""What a user may ask for, without parameters."""


def is_name(name: object) -> bool:
    """Whether there is an activation of that name, its parameters included.

    Example:
        >>> is_name("relu"), is_name("leaky_relu(0.2)"), is_name("leaky_relu(x)"), is_name(None)
        (True, True, False, False)
    """
    if not isinstance(name, str):
        return False
    try:
        return ACTIVATIONS[name].name == name
    except KeyError:
        return False


def with_parameters(family: str, *parameters: float) -> str:
    """The name of an activation with these parameters; without them where they are the usual ones.

    Example:
        >>> with_parameters("leaky_relu", 0.2), with_parameters("leaky_relu", 0.01), with_parameters("clamp", 0, 6)
        ('leaky_relu(0.2)', 'leaky_relu', 'relu6')
    """
    numbers = tuple(float(number) for number in parameters)
    if family == "clamp":
        usual = clamping(*numbers)
        if usual is not None:
            return usual
    defaults = _FAMILIES[family].__defaults__
    return family if numbers == defaults else f"{family}({', '.join(map(repr, numbers))})"


_BY_MODULE: dict[type[nn.Module], str] = {
    record.module: record.name for record in _RECORDS if isinstance(record.module, type)
}
_PARAMETERS: dict[type[nn.Module], Callable[[Any], str]] = {
    nn.GELU: lambda module: "gelu" if module.approximate == "none" else "gelu_tanh",
    nn.LeakyReLU: lambda module: with_parameters("leaky_relu", module.negative_slope),
    nn.ELU: lambda module: with_parameters("elu", module.alpha),
    nn.Softplus: lambda module: with_parameters("softplus", module.beta, module.threshold),
    nn.Hardtanh: lambda module: with_parameters("clamp", module.min_val, module.max_val),
}


def name_of(module: nn.Module | None) -> str | None:
    """The name of what a module computes, "" for nothing at all; None if there is no record of it.

    Example:
        >>> name_of(nn.ReLU6()), name_of(nn.GELU("tanh")), name_of(nn.LeakyReLU(0.2)), name_of(nn.GLU()), name_of(None)
        ('relu6', 'gelu_tanh', 'leaky_relu(0.2)', None, '')
    """
    if module is None:
        return ""
    parameters = _PARAMETERS.get(type(module))
    return _BY_MODULE.get(type(module)) if parameters is None else parameters(module)


def clamping(low: float, high: float) -> str | None:
    """The name without parameters of the activation that is clamp(low, high); None if there is none."""
    return next((record.name for record in ACTIVATIONS.values() if record.limits == (low, high)), None)
