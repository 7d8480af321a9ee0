"""Which kernel computes each step of a program, and why no other does. No memory is bound and no weight packed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sepconv.compile.groups import Convolution, Pool, SeparableGroup
from sepconv.compile.program import Copy, Form, Operation, Program, ProgramStep
from sepconv.compile.slices import Slices
from sepconv.kernels.halide.conv import depthwise, separable, stem
from sepconv.kernels.halide.jit import runtime

SPLIT, TORCH = "split", "torch"
"""Choices that differ from the usual one: a separable group by two kernels in turn, a group by PyTorch."""


@dataclass(frozen=True)
class Lowered:
    """How a step is computed.

    ``kernel`` is "halide", "torch" or "copy", ``reason`` says why not Halide, or why by two kernels (``split``).
    """

    kernel: str
    reason: str = ""
    split: bool = False


def lower(program: Program, slices: Slices, choices: Mapping[int, str] | None = None) -> tuple[Lowered, ...]:
    """The kernel of every step. ``choices``: steps that are not computed in the usual way."""
    chosen = choices or {}
    return tuple(lower_step(program, slices, i, chosen.get(i, "")) for i in range(len(program.steps)))


def lower_step(program: Program, slices: Slices, i: int, choice: str = "") -> Lowered:
    step = program.steps[i]
    if isinstance(step.work, Copy):
        return Lowered("copy")
    if isinstance(step.work, Operation):
        return Lowered("torch", step.work.reason)
    read = [place.form for place in step.inputs]
    if program.is_direct(i):
        read[0] = program.given[program.direct or 0]
    out = step.outputs[0].form
    if i < slices.steps:
        read, out = [_one_image(form) for form in read], _one_image(out)
    reason = _passed_over(step, read, out) or ("PyTorch was measured to be faster" if choice == TORCH else "")
    if reason:
        return Lowered("torch", reason)
    if not isinstance(step.work, SeparableGroup):
        return Lowered("halide")
    if choice == SPLIT:
        return Lowered("halide", "depthwise and pointwise in turn were measured to be faster", split=True)
    apart = separable.slower(step.work.depthwise.kernel_size)
    return Lowered("halide", apart, split=bool(apart))


def _one_image(form: Form) -> Form:
    return replace(form, shape=(1, *form.shape[1:]))


def _passed_over(step: ProgramStep, read: list[Form], out: Form) -> str:
    """Why none of the kernels computes a group, in a sentence; "" if one does."""
    tensors = [_outline(form) for form in (out, *read)]
    return runtime.missing() or runtime.unsuitable(*tensors) or _unfit(step, tensors[1], out)


def _outline(form: Form) -> Tensor:
    return torch.empty_strided(form.shape, form.stride, dtype=form.number.storage)


def _unfit(step: ProgramStep, x: Tensor, out: Form) -> str:
    group = step.group
    if out.elements == 0:
        return "the result is empty"
    if isinstance(group, SeparableGroup):
        return _slower_depthwise(group.depthwise, x) if separable.slower(group.depthwise.kernel_size) else ""
    if isinstance(group, Pool) or group is None:
        return ""
    if group.kind == "depthwise":
        return _slower_depthwise(group, x)
    if group.kind == "grouped":
        return f"no kernel for grouped convolutions (groups={group.groups})"
    if group.kind == "normal":
        if group.epilogue.residual or group.groups > 1 or set(group.dilation) != {1}:
            return "the kernel for normal convolutions has no dilation, groups and residual"
        bias = None if group.epilogue.bias is None else group.epilogue.bias.tensor
        activation = group.epilogue.activation
        return stem.supports(x, group.weight.tensor, bias, activation, group.stride, group.padding)
    if group.kind == "pointwise" and x.dim() == 4 and x.shape[1] == 1 and out.shape[1] > 1:
        return "with one input channel both layouts look the same to the kernel"
    return ""


def _slower_depthwise(group: Convolution, x: Tensor) -> str:
    geometry = (group.stride, group.padding, group.dilation)
    return depthwise.slower("forward", x, group.weight.tensor, *geometry, group.epilogue.activation, bound=True)
