"""From a step and how it was lowered to the call that computes it: a kernel bound to its memory and packed weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.compile.capture import first_line
from sepconv.compile.cases import constants_of
from sepconv.compile.groups import ComputedGroup
from sepconv.compile.lower import TORCH, KernelStep, Lowered
from sepconv.compile.numbers import NumberType
from sepconv.compile.operations import operation_call
from sepconv.compile.program import Copy, Operation, ProgramStep
from sepconv.compile.store import Store
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Chain, in_chains
from sepconv.kernels.halide.jit.runtime import BuildError


class BoundStep(NamedTuple):
    """``run()`` computes the step. ``kernel`` and ``reason`` are as in ``Lowered``, if the kernel could be built.

    ``holds`` keeps packed weights alive for the next size.
    """

    run: Callable[..., Any]
    kernel: str
    reason: str = ""
    holds: object = None


class _Packed(list[Buffer]):
    """Buffers over packed weights, shared between the sizes of a model."""


class _Memory(NamedTuple):
    """The tensors that a group reads and writes."""

    inputs: Sequence[Tensor]
    out: Tensor

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def residual(self) -> Tensor | None:
        return self.inputs[1] if len(self.inputs) > 1 else None


def bind_step(
    step: ProgramStep, lowered: Lowered, inputs: Sequence[Tensor], outputs: Sequence[Tensor], store: Store
) -> BoundStep:
    """The call that fills ``outputs`` from what is then in ``inputs``."""
    work = step.work
    if isinstance(work, Copy):
        return BoundStep(partial(outputs[0].copy_, inputs[0]), lowered.kernel)
    if isinstance(work, Operation):
        return BoundStep(operation_call(work, inputs, outputs), lowered.kernel, lowered.reason)
    return _bind_group(_InNumbers.of(step), lowered, _Memory(inputs, outputs[0]), store)


def bind_direct(step: ProgramStep, lowered: Lowered, x: Tensor, out: Tensor, store: Store) -> BoundStep:
    """The same for the first step of a network; ``run(x)`` takes any tensor with the sizes and strides of ``x``."""
    computed = _InNumbers.of(step)
    bound = _bind_group(computed, lowered, _Memory([x], out), store)
    if bound.kernel == TORCH:
        return bound._replace(run=lambda given: _through_torch(computed, _Memory([given], out)))
    call = bound.run
    if not isinstance(call, (Bound, Chain)):
        raise TypeError(f"{call} has no image to move")
    # Each kernel of one step reads the image before anything else.
    kernels = call.bound if isinstance(call, Chain) else [call]
    images = [next(part for part in kernel.prepared.given if isinstance(part, Buffer)) for kernel in kernels]

    def run(given: Tensor) -> None:
        for image in images:
            image.move(given.data_ptr())
        call()

    return bound._replace(run=run)


def ask_for(lowered: Lowered, inputs: Sequence[Tensor], out: Tensor, store: Store) -> BoundStep | None:
    """Bind the kernels of a step for nothing but to ask for them; what fails fails again when they are bound in use."""
    with suppress(Exception):
        return _bind_kernels(lowered, _Memory(inputs, out), store) if lowered.kernels else None
    return None


class _InNumbers(NamedTuple):
    """A group, and the numbers of what it reads and of its result."""

    group: ComputedGroup
    read: tuple[NumberType, ...]
    written: NumberType

    @classmethod
    def of(cls, step: ProgramStep) -> _InNumbers:
        if step.group is None:
            raise TypeError(f"no group is computed by {step}")
        return cls(step.group, tuple(place.form.number for place in step.inputs), step.outputs[0].form.number)


def _bind_group(computed: _InNumbers, lowered: Lowered, memory: _Memory, store: Store) -> BoundStep:
    reason = lowered.reason
    if lowered.kernels:
        try:
            return _bind_kernels(lowered, memory, store)
        except Exception as error:  # whatever goes wrong here is ours: the network runs all the same
            reason = str(error).splitlines()[0] if isinstance(error, BuildError) else first_line(error)
            warnings.warn(f"compile: a group runs through PyTorch: {reason}", stacklevel=2)
    return BoundStep(partial(_through_torch, computed, memory), TORCH, reason, _weights(computed.group))


def _through_torch(computed: _InNumbers, memory: _Memory) -> None:
    with torch.no_grad():
        given = [number.decode(tensor) for number, tensor in zip(computed.read, memory.inputs, strict=True)]
        memory.out.copy_(computed.written.encode(computed.group(*given)))


def _weights(group: ComputedGroup) -> list[Tensor]:
    """What PyTorch reads in every call, so that it need not be made again."""
    return [constant.tensor for constant in group.constants if constant is not None]


def _bind_kernels(lowered: Lowered, memory: _Memory, store: Store) -> BoundStep:
    if len(lowered.kernels) == 1:
        bound = _bind_kernel(lowered.kernels[0], memory, store)
    else:
        bound = _bind_in_turn(lowered.kernels, memory, store)
    return bound._replace(reason=lowered.reason)


def _bind_kernel(step: KernelStep, memory: _Memory, store: Store) -> BoundStep:
    binder, constants = step.backend.binder, constants_of(step.group, step.case, step.numbers)
    if binder is None:
        raise TypeError(f"{step.backend.name} cannot be bound to memory")
    plan = binder.plan(step.case)
    keys: tuple[Hashable, ...] = tuple(None if constant is None else constant.key for constant in constants)
    packed = store.keep(
        (step.backend.name, step.case.op, plan.variant, *keys),
        lambda: _Packed(binder.pack(plan, [None if constant is None else constant.tensor for constant in constants])),
    )
    others = memory.inputs[1:] if binder.several else memory.residual
    run = binder.bind(plan, memory.x, packed, others, memory.out)
    return BoundStep(run, step.backend.name, holds=packed)


def _bind_in_turn(kernels: Sequence[KernelStep], memory: _Memory, store: Store) -> BoundStep:
    """Depthwise and pointwise in turn, the depthwise result in memory of its own."""
    first, second = kernels
    between = first.case.result
    hidden = torch.empty_strided(between.shape, between.stride, dtype=between.dtype)
    bound = (
        _bind_kernel(first, _Memory([memory.x], hidden), store),
        _bind_kernel(second, _Memory([hidden, *memory.inputs[1:]], memory.out), store),
    )
    [run] = in_chains([half.run for half in bound])
    return BoundStep(run, first.backend.name, holds=(bound, hidden))
