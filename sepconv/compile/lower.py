"""Which kernel computes each step of a program, and why no other does: asked of the list that the functions ask too.

No memory is bound and no weight packed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sepconv.compile.groups import (
    ComputedGroup,
    Elementwise,
    GroupNormed,
    Pool,
    Resize,
    RowNorm,
    SeparableGroup,
    Shuffle,
    WindowPool,
)
from sepconv.compile.program import Copy, Operation, Program, TensorForm
from sepconv.compile.slices import Slices
from sepconv.compile.store import Constant
from sepconv.kernels import backends, case
from sepconv.kernels.backends import Backend, InTurn
from sepconv.kernels.case import Case, Outline

SPLIT, TORCH = "split", "torch"
"""Choices that differ from the usual one: a separable group by two kernels in turn, a group by PyTorch."""


@dataclass(frozen=True)
class KernelStep:
    """A group, or half of a separable one, by a backend that has a binder for it."""

    group: ComputedGroup
    case: Case
    backend: Backend


@dataclass(frozen=True)
class Lowered:
    """How a step is computed.

    Attributes:
        kernel: the backend's name, "torch" or "copy".
        reason: why none of the kernels before it in the list.
        kernels: one for a group, two where depthwise and pointwise run in turn, none where PyTorch computes the step.
    """

    kernel: str
    reason: str = ""
    kernels: tuple[KernelStep, ...] = ()


def lower(program: Program, slices: Slices, choices: Mapping[int, str] | None = None) -> tuple[Lowered, ...]:
    """The kernel of every step. ``choices``: steps that are not computed in the usual way."""
    chosen = choices or {}
    return tuple(lower_step(program, slices, i, chosen.get(i, "")) for i in range(len(program.steps)))


def lower_step(program: Program, slices: Slices, i: int, choice: str = "") -> Lowered:
    step = program.steps[i]
    if isinstance(step.work, Copy):
        return Lowered("copy")
    if isinstance(step.work, Operation):
        return Lowered(TORCH, step.work.reason)
    read = [place.form for place in step.inputs]
    if program.is_direct(i):
        read[0] = program.given[program.direct or 0]
    outlines = [_outline(form, i < slices.steps) for form in (*read, step.outputs[0].form)]
    return _lower_group(step.work, outlines[:-1], outlines[-1], choice)


def _outline(form: TensorForm, one_image: bool) -> Outline:
    return Outline((1, *form.shape[1:]) if one_image else form.shape, form.stride, form.number.storage)


def _lower_group(group: ComputedGroup, read: Sequence[Outline], out: Outline, choice: str) -> Lowered:
    if choice == TORCH:
        return Lowered(TORCH, "PyTorch was measured to be faster")
    known = case_of(group, read, out).into(out)
    if choice == SPLIT:
        in_turn, reason = _in_turn(group, known), "depthwise and pointwise in turn were measured to be faster"
        if in_turn:
            return Lowered(in_turn[0].backend.name, reason, in_turn)
    found = backends.choose(known)
    kernels, reason = _kernels(group, known, found.backend), "".join(list(found.reasons.values())[-1:])
    return Lowered(kernels[0].backend.name if kernels else TORCH, reason, kernels)


def _kernels(group: ComputedGroup, known: Case, backend: Backend) -> tuple[KernelStep, ...]:
    """How a backend computes a group; none where it cannot be bound, as PyTorch."""
    if backend.prepare is InTurn:
        return _in_turn(group, known)
    return () if backend.binder is None else (KernelStep(group, known, backend),)


def _in_turn(group: ComputedGroup, known: Case) -> tuple[KernelStep, ...]:
    """Depthwise and pointwise, each by its own choice; none where one of them cannot be bound."""
    if not isinstance(group, SeparableGroup) or known.then is None:
        return ()
    parts = ((group.depthwise, known.first), (group.pointwise, known.then))
    kernels = [KernelStep(part, half, backends.choose(half).backend) for part, half in parts]
    return () if any(kernel.backend.binder is None for kernel in kernels) else tuple(kernels)


def case_of(group: ComputedGroup, read: Sequence[Outline], out: Outline) -> Case:
    """A group as kernels know it; its weights need not be made again for that."""
    x, residual = read[0], read[1] if len(read) > 1 else None
    if isinstance(group, Elementwise):
        return case.elementwise(read, out, group.expression)
    if isinstance(group, GroupNormed):
        return case.group_norm(x, out, group.detail)
    if isinstance(group, Resize):
        return case.resize(x, out, group.detail)
    if isinstance(group, RowNorm):
        return case.row_norm(x, out, *group.detail)
    if isinstance(group, WindowPool):
        return case.window(x, out, group.geometry, group.window)
    if isinstance(group, Shuffle):
        return case.shuffle(x, residual, out, group.parts)
    if isinstance(group, Pool):
        return case.pool(x, Outline.contiguous_of(x.shape[:2], x.dtype), group.what)
    if isinstance(group, SeparableGroup):
        first = case_of(group.depthwise, [x], out)
        return case.separable(first, case_of(group.pointwise, [first.y, *read[1:]], out))
    weight, end = _outline_of(group.weight), group.epilogue
    bias = None if end.bias is None else _outline_of(end.bias)
    if group.kind == "depthwise":
        return case.depthwise(x, weight, bias, group.geometry, end.activation)
    if group.kind in ("normal", "grouped"):
        return case.normal(x, weight, bias, residual, group.geometry, end.activation)
    return case.pointwise(x, weight, bias, residual, end.activation)


def _outline_of(constant: Constant) -> Outline:
    return Outline.contiguous_of(constant.shape, constant.number.storage)
