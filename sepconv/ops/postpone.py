"""Functions of PyTorch that a pending tensor passes through without its numbers: norms, activations, sums.

Each takes what PyTorch's own takes, and returns ``NotImplemented`` where the numbers are needed after all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.activations import with_parameters
from sepconv.kernels.halide.training.passes import multiplied
from sepconv.ops import stages
from sepconv.ops.pending import HANDLERS, Call, Pending, Unfinished, is_ordinary, value_of, waiting
from sepconv.ops.stages import Before, number


def _postpones(*functions: Any) -> Callable[[Any], Any]:
    def keep(handler: Any) -> Any:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return keep


@_postpones(F.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    work = waiting(input)
    if work is None or work.before is not None or not torch.is_grad_enabled():
        return NotImplemented
    vectors, shape = (running_mean, running_var, weight, bias), input.outline[0]
    if not all([_is_vector(vector, shape[1]) for vector in vectors]) or not _pays(work.call):
        return NotImplemented
    if training and prod(shape) == shape[1]:
        return NotImplemented  # one value a channel, of which PyTorch complains
    if training:
        with work.as_when_made():
            mean, var = work.call.run(True)[1:]
        if mean is None or var is None:
            return NotImplemented
        if running_mean is not None and running_var is not None:
            _follow(running_mean, running_var, mean, var, momentum, prod(shape) // shape[1])
    elif running_mean is None or running_var is None:
        return NotImplemented
    else:
        mean, var = running_mean, running_var
    if work.call.layer.asked is None:
        work.call.layer.asked = True
    before = Before(mean, var, weight, bias, eps)
    return Pending.of(Unfinished(work.call, before), input.outline)


def _is_vector(vector: Tensor | None, channels: int) -> bool:
    return vector is None or (is_ordinary(vector) and vector.shape == (channels,) and vector.dtype is torch.float32)


def _pays(call: Call) -> bool:
    """Whether a kernel of ours may still gather the statistics of what a convolution gives, or has done so."""
    return call.output is None or call.output.mean is not None


def _follow(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int) -> None:
    """Running statistics go after those of this batch; that of the variance is the unbiased one."""
    running_mean.lerp_(mean.detach(), momentum)
    running_var.mul_(number(1 - momentum)).add_(var.detach(), alpha=momentum * count / (count - 1))


# An activation without a norm in front of a pointwise layer, measured on Granite Rapids, forward and back: 1.1 to 1.5
# times PyTorch's speed of more than half a million numbers, 0.85 to 1.1 of less than a quarter; in bfloat16, whose
# products are not called without Python, 0.6 to 0.95.
_LEAST_ALONE = 1 << 18


def _activate(input: Any, activation: str, inplace: bool = False) -> Any:
    work = waiting(input)
    if work is None or not torch.is_grad_enabled():
        return NotImplemented
    norm = work.before
    if norm is None:
        if prod(input.outline[0]) < _LEAST_ALONE or not multiplied(input.outline[2]):
            return NotImplemented
        norm = Before.alone(activation)
    elif norm.activation:
        return NotImplemented
    before = Before(*norm[:5], activation)
    if inplace:
        work.before = before
        return input
    return Pending.of(Unfinished(work.call, before), input.outline)


def _usual(name: str) -> Callable[..., Any]:
    return lambda input, inplace=False: _activate(input, name, inplace)


def _method(name: str, inplace: bool = False) -> Callable[..., Any]:
    return lambda input: _activate(input, name, inplace)


for _name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish"):
    _postpones(getattr(F, _name))(_usual(_name))
for _name in ("relu", "sigmoid", "tanh"):
    _postpones(getattr(torch, _name), getattr(Tensor, _name))(_method(_name))
_postpones(torch.relu_, Tensor.relu_)(_method("relu", inplace=True))
_postpones(F.sigmoid)(_method("sigmoid"))
_postpones(F.tanh)(_method("tanh"))


@_postpones(F.hardtanh)
def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _activate(input, _clamp(min_val, max_val), inplace)


_clamp = lru_cache(maxsize=64)(partial(with_parameters, "clamp"))


@_postpones(F.leaky_relu)
def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return _activate(input, with_parameters("leaky_relu", negative_slope), inplace)


@_postpones(F.elu)
def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _activate(input, with_parameters("elu", alpha), inplace)


@_postpones(F.gelu)
def _gelu(input: Any, *, approximate: str = "none") -> Any:
    return _activate(input, "gelu" if approximate == "none" else "gelu_tanh")


@_postpones(Tensor.__add__, Tensor.__radd__, Tensor.add, torch.add)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    """The sum of a norm's result and a residual in one pass."""
    work = waiting(input)
    if work is None or work.before is None:
        input, other = other, input
        work = waiting(input)
    if work is None or work.before is None or work.before.mean is None or alpha != 1 or not torch.is_grad_enabled():
        return NotImplemented
    residual, outline = value_of(other), input.outline
    fits = is_ordinary(residual) and residual.shape == outline[0] and residual.dtype is outline[2]
    if not fits or work.finished is not None:
        return NotImplemented
    with work.as_when_made():
        z = work.call.run(False).y
    return stages.finish(z, work.before, residual)


@_postpones(Tensor.__iadd__, Tensor.add_)
def _add_in_place(input: Any, other: Any, *, alpha: float = 1) -> Any:
    result = _add(input, other, alpha=alpha) if type(input) is Pending else NotImplemented
    if result is not NotImplemented:
        work: Unfinished = input.work
        work.finish_as(result)
        work.changed = True
    return result
