"""Which kernel computes each step of a program, and why no other does: asked of the list that the functions ask too.

No memory is bound and no weight packed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sepconv.compile.cases import cases_of
from sepconv.compile.groups import ComputedGroup, SeparableGroup
from sepconv.compile.numbers import NumberType
from sepconv.compile.program import Copy, Operation, Program, TensorForm
from sepconv.compile.slices import Slices
from sepconv.kernels import backends
from sepconv.kernels.backends import Backend, InTurn
from sepconv.kernels.case import Case, Outline

SPLIT, TORCH = "split", "torch"
"""Choices that differ from the usual one: a separable group by two kernels in turn, a group by PyTorch."""

FEW_MACS, FEW_NUMBERS = 100_000, 1 << 14
"""Multiply-adds, and numbers that are read and written, that one thread is through with before others have begun."""


@dataclass(frozen=True)
class KernelStep:
    """A group, or half of a separable one, by a backend that has a binder for it.

    ``numbers``: of what is read, then of the result.
    """

    group: ComputedGroup
    case: Case
    backend: Backend
    numbers: tuple[NumberType, ...]


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
    if i < slices.steps:
        read = [_one_image(form) for form in read]
    out = step.outputs[0].form
    lowered = lower_group(step.work, read, _one_image(out) if i < slices.steps else out, choice)
    return replace(lowered, reason="; ".join(filter(None, (step.note, lowered.reason))))


def _one_image(form: TensorForm) -> TensorForm:
    return replace(form, shape=(1, *form.shape[1:]))


def _outline(form: TensorForm) -> Outline:
    return Outline(form.shape, form.stride, form.number.storage)


def lower_group(group: ComputedGroup, read: Sequence[TensorForm], out: TensorForm, choice: str = "") -> Lowered:
    """The kernel of a group that reads and writes tensors of these forms."""
    if choice == TORCH:
        return Lowered(TORCH, "PyTorch was measured to be faster")
    numbers = tuple(form.number for form in (*read, out))
    cases = cases_of(group, [_outline(form) for form in read], _outline(out))
    if group.macs(out.shape) <= FEW_MACS and sum(math.prod(form.shape) for form in (*read, out)) <= FEW_NUMBERS:
        cases = [_by_one_thread(known) for known in cases]
    lowered = [_lower_case(KernelGroup(group, numbers), known, choice) for known in cases]
    unknown = Lowered(TORCH, "its weights are not quantised")
    return next((found for found in lowered if found.kernels), lowered[0] if lowered else unknown)


def _by_one_thread(known: Case) -> Case:
    return replace(known, threads=1, then=None if known.then is None else _by_one_thread(known.then))


class KernelGroup(NamedTuple):
    """A group, and the numbers of what it reads and of its result."""

    group: ComputedGroup
    numbers: tuple[NumberType, ...]


def _lower_case(computed: KernelGroup, known: Case, choice: str) -> Lowered:
    if choice == SPLIT:
        in_turn, reason = _in_turn(computed, known), "depthwise and pointwise in turn were measured to be faster"
        if in_turn:
            return Lowered(in_turn[0].backend.name, reason, in_turn)
    found = backends.choose(known)
    kernels, reason = _kernels(computed, known, found.backend), "".join(list(found.reasons.values())[-1:])
    return Lowered(kernels[0].backend.name if kernels else TORCH, reason, kernels)


def _kernels(computed: KernelGroup, known: Case, backend: Backend) -> tuple[KernelStep, ...]:
    """How a backend computes a group; none where it cannot be bound, as PyTorch."""
    if backend.prepare is InTurn:
        return _in_turn(computed, known)
    return () if backend.binder is None else (KernelStep(computed.group, known, backend, computed.numbers),)


def _in_turn(computed: KernelGroup, known: Case) -> tuple[KernelStep, ...]:
    """Depthwise and pointwise, each by its own choice; none where one of them cannot be bound."""
    group, (x, *others) = computed
    if not isinstance(group, SeparableGroup) or known.then is None:
        return ()
    between = group.between or NumberType(known.y.dtype)
    parts = ((group.depthwise, known.first, (x, between)), (group.pointwise, known.then, (between, *others)))
    kernels = [KernelStep(part, half, backends.choose(half).backend, numbers) for part, half, numbers in parts]
    return () if any(kernel.backend.binder is None for kernel in kernels) else tuple(kernels)
